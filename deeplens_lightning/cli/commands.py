"""Functions of commands, and a list of all; the parser takes options and help from the signature of each."""

from __future__ import annotations

from typing import Any, Literal

from rich.console import Console

from deeplens_lightning.datamodule import ActivationDataModule
from deeplens_lightning.shards.writer import SHARD_BYTES


def inspect(
    hf_model: str,
    layer: int | list[int] | None = None,
    hook: str | list[str] | None = None,
    model_kwargs: dict[str, Any] | None = None,
) -> None:
    """Print the hook points of a model, without loading weights.

    Args:
        hf_model: hub id, folder, GGUF file, or demo:lm.
        layer: one layer or several; prints which weights this choice loads and skips.
        hook: one hook point or several: kinds (`mlp_in`, `mlp_act`, `mlp_post`, `mlp_out`, `attn_out`, `attn_z`,
            `resid_pre`, `resid_mid`, `resid_post`, `final_norm`), canonical names (`layers.3.mlp_out`), TransformerLens
            names (`blocks.3.hook_mlp_out`) or module paths (`transformer.h.3.mlp`).
        model_kwargs: arguments of `from_pretrained`.
    """
    from deeplens_lightning.model.inspection import inspect_model, render

    Console().print(render(inspect_model(hf_model, layer, hook, model_kwargs)))


def report(run_dir: str, out: str | None = None) -> None:
    """Write one self-contained HTML page about a run.

    Args:
        run_dir: folder of a run, or a folder of several runs: the newest is taken.
        out: file to write; default report.html in the run's folder.
    """
    from deeplens_lightning.reporting.report import write_report

    print(write_report(run_dir, out))


def extract(
    data: ActivationDataModule,
    out: str,
    max_rows: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    storage: Literal["exact", "int8"] = "exact",
    nonfinite: Literal["refuse", "drop"] = "refuse",
    plan: bool = False,
    accelerator: str = "auto",
    devices: int | str = 1,
    num_nodes: int = 1,
    strategy: str = "auto",
    yes: bool = False,
) -> None:
    """Write activations to shards; the same command, run again, continues where it was stopped.

    Args:
        data: the data module, which defines the model, the hook points and the text.
        out: folder of the cache, a path or an fsspec URL.
        max_rows: number of rows to write; default all.
        shard_bytes: size of a shard on disk, in bytes.
        storage: exact, or int8 (8 bits per value and one scale per row).
        nonfinite: refuse or drop rows that hold NaN or infinity.
        plan: print the estimated rows, bytes and time, and write nothing.
        accelerator: accelerator of the Trainer.
        devices: devices of the Trainer.
        num_nodes: number of nodes of the Trainer.
        strategy: strategy of the Trainer; every rank writes its own shards.
        yes: write more than 5 GB from a terminal; otherwise the command stops and says the size.
    """
    from deeplens_lightning.extraction.predict import estimate, run

    if plan:
        print(estimate(data, max_rows=max_rows, shard_bytes=shard_bytes, storage=storage))
        return
    run(
        data,
        out,
        max_rows=max_rows,
        shard_bytes=shard_bytes,
        storage=storage,
        nonfinite=nonfinite,
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy,
        yes=yes,
    )


def verify(shards: str, upgrade: bool = False) -> None:
    """Compare every shard with its checksum, and all files of a cache with each other.

    Args:
        shards: folder, file, glob or fsspec URL.
        upgrade: if all is well, rewrite the JSON files of a cache of an older format version.

    Raises:
        ValueError: shards are damaged or missing; the message lists each with what to do.
    """
    from deeplens_lightning.shards import verify as read_all

    found = read_all(shards, upgrade=upgrade)
    if found.problems:
        raise ValueError("\n  ".join([f"{len(found.problems)} problem(s) in {shards}:", *found.problems]))
    print(f"{shards}: {found.shards} shard(s), {found.rows:,} rows, {found.nbytes:,} bytes, all intact")
    if not found.finished:
        print(
            "It is not finished: run the command that wrote it again (extract, or fit with write_shards) to continue it."
        )
    for folder in found.upgraded:
        print(f"{folder} has the present format version now.")


FUNCTIONS = {
    "inspect": "deeplens_lightning.cli.commands:inspect",
    "bench": "deeplens_lightning.cli.bench:bench",
    "extract": "deeplens_lightning.cli.commands:extract",
    "verify": "deeplens_lightning.cli.commands:verify",
    "report": "deeplens_lightning.cli.commands:report",
    "latents": "deeplens_lightning.cli.latents:latents",
    "doctor": "deeplens_lightning.cli.doctor.command:doctor",
}
"""The function of every command in `cli.help.OWN_COMMANDS`, as `module:function`: only the one that runs is imported."""
