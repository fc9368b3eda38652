"""`FitSummary`: the table at the end of a fit, and the curves that a report draws."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from typing_extensions import override

from deeplens_lightning.callbacks.support import batch_rows, datamodule_of, hook_names, log_every
from deeplens_lightning.reporting.run_folder import append_jsonl, run_folder, write_json

# What is shown, in this order, where the run measured it: metric, heading, format.
_METRICS = (
    ("val/fvu", "held-out FVU", "{:.4f}"),
    ("val/cosine", "held-out cosine", "{:.4f}"),
    ("val/l0", "held-out L0", "{:.1f}"),
    ("val/dead_fraction", "dead latents", "{:.2%}"),
    ("val/ce_recovered", "CE recovered", "{:.4f}"),
    ("val/kl", "KL to the clean model", "{:.4f} nats"),
)


class FitSummary(Callback):
    """Prints what a fit came to, on rank 0, with rich; writes the same as `summary.json`.

    Tokens are rows served to the SAE, of all ranks; tokens/s is over the time spent training, validation
    and start aside. Held-out metrics are the last validation's. In a sweep each SAE has its own row.
    Beside it, `curves.jsonl` keeps every logged scalar, whatever loggers the Trainer has.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._tokens = 0
        self._seconds = 0.0
        self._resumed_at: float | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._folder = run_folder(trainer)
            self._tokens, self._seconds, self._resumed_at = 0, 0.0, None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._resumed_at = time.perf_counter()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause()

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._tokens += batch_rows(batch)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every = log_every(trainer)
        if trainer.is_global_zero and every > 0 and trainer.global_step % every == 0:
            self._keep_curves(trainer, ("val/", "test/"), keep=False)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.training and not trainer.sanity_checking:
            self._resumed_at = time.perf_counter()
        if trainer.is_global_zero and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._keep_curves(trainer, ("val/",), keep=True)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After every callback's `on_train_end`, so that what they measured is there."""
        if not trainer.is_global_zero or self._folder is None:
            return
        summary = self.summary(trainer)
        write_json(self._folder / "summary.json", summary)
        Console().print(summary_table(summary))

    def summary(self, trainer: Trainer) -> dict[str, Any]:
        """What the table shows: `tokens`, `tokens_per_second`, `steps`, `hooks`, `metrics`, `written`."""
        tokens = self._tokens * trainer.world_size
        return {
            "tokens": tokens,
            "tokens_per_second": tokens / self._seconds if self._seconds > 0 else None,
            "seconds": self._seconds,
            "steps": trainer.global_step,
            "hooks": list(hook_names(trainer)),
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "val_rows": getattr(datamodule_of(trainer), "val_rows", None),
            "written": [str(path) for path in _written(trainer, self._folder)],
        }

    def _pause(self) -> None:
        if self._resumed_at is not None:
            self._seconds += time.perf_counter() - self._resumed_at
            self._resumed_at = None

    def _keep_curves(self, trainer: Trainer, prefixes: tuple[str, ...], *, keep: bool) -> None:
        metrics = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith(prefixes) == keep
        }
        if metrics:
            assert self._folder is not None
            append_jsonl(self._folder / "curves.jsonl", [{"step": trainer.global_step} | metrics])


def summary_table(summary: dict[str, Any]) -> Table:
    """The rich table of `FitSummary.summary`."""
    table = Table(title="summary", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    if summary["hooks"]:
        table.add_row("hook points", ", ".join(summary["hooks"]))
    speed = summary["tokens_per_second"]
    table.add_row("tokens", f"{summary['tokens']:,} in {summary['steps']:,} steps")
    table.add_row("tokens/s", f"{speed:,.0f}" if speed else "not measured")
    metrics = summary["metrics"]
    for name, heading, shape in _METRICS:
        for suffix in _suffixes(metrics, name):
            text = shape.format(metrics[name + suffix])
            rows = metrics.get(f"val/rows{suffix}")
            if name == "val/dead_fraction" and rows is not None:
                whole = "all " if summary["val_rows"] is not None and rows < summary["val_rows"] else ""
                text += f" (fired on none of {whole}{int(rows):,} held-out rows)"
            table.add_row(heading + suffix.replace("/", " ", 1), text)
    if not _suffixes(metrics, "val/fvu"):
        table.add_row("held-out FVU", "not measured: no validation ran")
    if summary["written"]:
        table.add_row("written", _places([Path(path) for path in summary["written"]]))
    return table


def _places(paths: list[Path]) -> str:
    """The first folder, and under it what lies inside it; the rest as it is."""
    folder, inside, outside = paths[0], [], []
    for path in paths[1:]:
        if path.is_relative_to(folder):
            inside.append(f"  {path.relative_to(folder)}")
        else:
            outside.append(str(path))
    return "\n".join([str(folder), *inside, *outside])


def _suffixes(metrics: dict[str, float], name: str) -> list[str]:
    """Nothing for the metric itself, `/<name>` for each SAE of a sweep."""
    return [key[len(name) :] for key in metrics if key == name or key.startswith(name + "/")]


def _written(trainer: Trainer, folder: Path | None) -> Iterator[Path]:
    seen = set()
    places = [] if folder is None else [folder]
    checkpoint = trainer.checkpoint_callback
    places += [Path(p) for n in ("best_model_path", "last_model_path") if (p := getattr(checkpoint, n, ""))]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        places += [Path(path) for path in getattr(callback, "written", ())]
    for path in places:
        if path not in seen:
            seen.add(path)
            yield path
