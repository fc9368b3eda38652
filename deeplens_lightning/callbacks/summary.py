"""`FitSummary`: print a table at the end of a fit, and keep the curves that a report draws."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from rich.table import Table
from typing_extensions import override

from deeplens_lightning.activation_data import activation_data, data_parallel_ranks
from deeplens_lightning.callbacks.support import WritesFiles, batch_rows, log_every
from deeplens_lightning.reporting.run_folder import append_jsonl, run_folder, write_json

# Rows of the table, in this order, for the metrics that the run measured: metric, heading, format.
_METRICS = (
    ("val/fvu", "held-out FVU", "{:.4f}"),
    ("val/cosine", "held-out cosine", "{:.4f}"),
    ("val/l0", "held-out L0", "{:.1f}"),
    ("val/dead_fraction", "dead latents", "{:.2%}"),
    ("val/ce_recovered", "CE recovered", "{:.4f}"),
    ("val/kl", "KL to the clean model", "{:.4f} nats"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Figures of a finished fit; the fields of `summary.json`.

    Attributes:
        tokens: rows served to the SAE, over all ranks.
        tokens_per_second: over the time spent training, without start and validation; None where not measured.
        seconds: time spent training, without start and validation.
        steps: optimizer steps, those before a resume included.
        hooks: canonical names of the hook points that batches hold.
        metrics: last value of every logged metric.
        val_rows: the data module's setting `val_rows`, the requested number of held-out rows; None if it has none.
        written: files and folders written by checkpointing and by callbacks, the run's folder first.
    """

    tokens: int
    tokens_per_second: float | None
    seconds: float
    steps: int
    hooks: list[str]
    metrics: dict[str, float]
    val_rows: int | None
    written: list[str]


class FitSummary(Callback):
    """Prints a table of results at the end of a fit, on rank 0, and writes it as `summary.json`.

    Tokens are rows served to the SAE, over all ranks; tokens/s leaves start and validation out. Held-out metrics are
    those of the last validation. In a grid each SAE has its own row. During the fit `curves.jsonl` gets every logged
    scalar, with any logger and with none.
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
            self._append_curves(trainer, ("val/", "test/"), keep=False)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.training and not trainer.sanity_checking:
            self._resumed_at = time.perf_counter()
        if trainer.is_global_zero and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._append_curves(trainer, ("val/",), keep=True)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print and write the summary: here, after every callback has measured in its `on_train_end`."""
        if not trainer.is_global_zero or self._folder is None:
            return
        summary = self.summary(trainer)
        write_json(self._folder / "summary.json", asdict(summary))
        Console().print(summary_table(summary))

    def summary(self, trainer: Trainer) -> Summary:
        """The figures of the fit up to now."""
        tokens = self._tokens * data_parallel_ranks(trainer)
        data = activation_data(trainer)
        return Summary(
            tokens=tokens,
            tokens_per_second=tokens / self._seconds if self._seconds > 0 else None,
            seconds=self._seconds,
            steps=trainer.global_step,
            hooks=list(data.hook_names),
            metrics={name: float(value) for name, value in trainer.callback_metrics.items()},
            val_rows=data.val_rows,
            written=[str(path) for path in _written(trainer, self._folder)],
        )

    def _pause(self) -> None:
        if self._resumed_at is not None:
            self._seconds += time.perf_counter() - self._resumed_at
            self._resumed_at = None

    def _append_curves(self, trainer: Trainer, prefixes: tuple[str, ...], *, keep: bool) -> None:
        """Append the metrics whose names start with one of the prefixes (`keep`), or all others, to the curves."""
        metrics = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith(prefixes) == keep
        }
        if metrics:
            assert self._folder is not None
            append_jsonl(self._folder / "curves.jsonl", [{"step": trainer.global_step} | metrics])


def summary_table(summary: Summary) -> Table:
    """The summary as a rich table."""
    table = Table(title="summary", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    if summary.hooks:
        table.add_row("hook points", ", ".join(summary.hooks))
    speed = summary.tokens_per_second
    table.add_row("tokens", f"{summary.tokens:,} in {summary.steps:,} steps")
    table.add_row("tokens/s", f"{speed:,.0f}" if speed else "not measured")
    metrics = summary.metrics
    for name, heading, shape in _METRICS:
        for suffix in _suffixes(metrics, name):
            text = shape.format(metrics[name + suffix])
            rows = metrics.get(f"val/rows{suffix}")
            if name == "val/dead_fraction" and rows is not None:
                whole = "all " if summary.val_rows is not None and rows < summary.val_rows else ""
                text += f" (fired on none of {whole}{int(rows):,} held-out rows)"
            table.add_row(heading + suffix.replace("/", " ", 1), text)
    if not _suffixes(metrics, "val/fvu"):
        table.add_row("held-out FVU", "not measured: no validation ran")
    if summary.written:
        table.add_row("written", _shown_paths([Path(path) for path in summary.written]))
    return table


def _shown_paths(paths: list[Path]) -> str:
    """One path a line: the first, then those inside it relative to it and indented, then the others in full."""
    folder, inside, outside = paths[0], [], []
    for path in paths[1:]:
        if path.is_relative_to(folder):
            inside.append(f"  {path.relative_to(folder)}")
        else:
            outside.append(str(path))
    return "\n".join([str(folder), *inside, *outside])


def _suffixes(metrics: dict[str, float], name: str) -> list[str]:
    """What follows `name` in the names of its metrics: "" for a single SAE, `/<sae>` for each SAE of a grid."""
    return [key[len(name) :] for key in metrics if key == name or key.startswith(name + "/")]


def _written(trainer: Trainer, folder: Path | None) -> Iterator[Path]:
    """The run's folder, the best and last checkpoint, and what callbacks list as written, each once."""
    seen = set()
    places = [] if folder is None else [folder]
    checkpoint = trainer.checkpoint_callback
    if isinstance(checkpoint, ModelCheckpoint):
        places += [Path(path) for path in (checkpoint.best_model_path, checkpoint.last_model_path) if path]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WritesFiles):
            places += [Path(path) for path in callback.written]
    for path in places:
        if path not in seen:
            seen.add(path)
            yield path
