"""What the command line does beside Lightning's own subcommands: one function a command."""

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
        layer: one or several; with `hook`, what that choice loads and skips.
        hook: kinds, canonical names, TransformerLens names or module paths.
        model_kwargs: for `from_pretrained`.
    """
    from deeplens_lightning.model.inspection import inspect_model, render

    Console().print(render(inspect_model(hf_model, layer, hook, model_kwargs)))


def bench(
    data: ActivationDataModule, pairs: int = 10, model_batches: int = 64, out: str | None = None
) -> None:
    """Measure the stream against the bare model stopped at the hook point, in turn.

    Args:
        data: what to stream; the arguments of ActivationDataModule.
        pairs: measurements of each.
        model_batches: model batches a measurement.
        out: JSON file for the figures.
    """
    from deeplens_lightning.cli.bench import bench as run

    run(data, pairs, model_batches, out)


def report(run_dir: str, out: str | None = None) -> None:
    """Write one self-contained HTML page about a run.

    Args:
        run_dir: folder of a run, or of several, of which the newest is taken.
        out: the page; default report.html in the run's folder.
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
) -> None:
    """Write activations to shards; the same command again goes on where it was killed.

    Args:
        data: what to extract; the arguments of ActivationDataModule.
        out: folder of the cache, a path or an fsspec URL.
        max_rows: rows to write; default all.
        shard_bytes: size of a shard on disk.
        storage: exact, or int8 (8 bits and a scale a row).
        nonfinite: refuse or drop rows that hold NaN or infinity.
        plan: only say how many rows, bytes and hours it takes.
        accelerator: Lightning's.
        devices: Lightning's.
        num_nodes: Lightning's.
        strategy: Lightning's; every rank writes its own shards.
    """
    from deeplens_lightning.extraction.predict import run

    estimate = run(
        data,
        out,
        max_rows=max_rows,
        shard_bytes=shard_bytes,
        storage=storage,
        nonfinite=nonfinite,
        plan=plan,
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy,
    )
    if estimate is not None:
        print(estimate)


def verify(shards: str) -> None:
    """Compare every shard with its checksum.

    Args:
        shards: folder, file, glob or fsspec URL.

    Raises:
        ValueError: something is damaged or missing; each is named, with what to do.
    """
    from deeplens_lightning.shards import verify as read_all

    found = read_all(shards)
    if found.problems:
        raise ValueError("\n  ".join([f"{len(found.problems)} problem(s) in {shards}:", *found.problems]))
    print(f"{shards}: {found.shards} shard(s), {found.rows:,} rows, {found.nbytes:,} bytes, all as written")
