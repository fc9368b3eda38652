"""What the command line does beside Lightning's own subcommands: one function a command."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from deeplens_lightning.datamodule import ActivationDataModule


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
    from deeplens_lightning.inspection import inspect_model, render

    Console().print(render(inspect_model(hf_model, layer, hook, model_kwargs)))


def bench(
    data: ActivationDataModule, pairs: int = 10, model_batches: int = 24, out: str | None = None
) -> None:
    """Measure the stream against the bare model stopped at the hook point, in turn.

    Args:
        data: what to stream; the arguments of ActivationDataModule.
        pairs: measurements of each.
        model_batches: model batches a measurement.
        out: JSON file for the figures.
    """
    from deeplens_lightning.bench import bench as run

    run(data, pairs, model_batches, out)


def report(run_dir: str, out: str | None = None) -> None:
    """Write one self-contained HTML page about a run.

    Args:
        run_dir: folder of a run, or of several, of which the newest is taken.
        out: the page; default report.html in the run's folder.
    """
    from deeplens_lightning.reporting.report import write_report

    print(write_report(run_dir, out))
