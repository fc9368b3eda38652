"""The figures of a fit and the files that hold its weights, and the table that shows them.

In: what `FitSummary` has measured. Out: a `Summary`, whose fields are those of `summary.json`, and a table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

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
class SavedWeights:
    """Weights of a fit and the file that holds them.

    Attributes:
        step: optimizer steps that had been taken.
        file: the checkpoint that holds them; None if they are not kept.
        why_not: why they are not kept; None if they are.
    """

    step: int
    file: str | None
    why_not: str | None = None

    def __str__(self) -> str:
        where = self.file if self.file is not None else f"these weights are not kept: {self.why_not}"
        return f"step {self.step:,}: {where}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BestWeights:
    """The best checkpoint of a `ModelCheckpoint` with `monitor`.

    Attributes:
        monitor: the monitored metric.
        value: its value when the file was saved.
        step: optimizer steps before the file was saved; None if the file cannot be read here.
        file: the checkpoint.
        value_is_older: the value was measured before the last step in the file, so other weights gave it.
    """

    monitor: str
    value: float
    step: int | None
    file: str
    value_is_older: bool

    def __str__(self) -> str:
        older = ", measured before the weights of this file" if self.value_is_older else ""
        step = "" if self.step is None else f" at step {self.step:,}"
        return f"{self.value:.4f}{older}{step}: {self.file}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Figures of a fit that has ended; the fields of `summary.json`.

    Attributes:
        tokens: rows trained on, over all ranks.
        tokens_per_second: over the time spent training, without start and validation; None where not measured.
        seconds: time spent training, without start and validation.
        steps: optimizer steps, those before a resume included.
        since_step: step from which tokens and seconds are counted: 0, unless the fit continued from a checkpoint without
            these numbers.
        hooks: canonical names of the hook points that batches hold.
        metrics: last value of every logged metric; the held-out figures are those of the last validation.
        val_rows: the data module's setting `val_rows`, the requested number of held-out rows; None if it has none.
        stopped: the error or signal that ended the fit; None if it ended by itself.
        figures: the weights that the held-out figures were measured with; None without held-out figures.
        last: the weights after the last step.
        best: the best checkpoints, one for each monitored metric.
        written: files and folders written by checkpointing and by callbacks, the run's folder first.
    """

    tokens: int
    tokens_per_second: float | None
    seconds: float
    steps: int
    since_step: int = 0
    hooks: list[str]
    metrics: dict[str, float]
    val_rows: int | None
    stopped: str | None
    figures: SavedWeights | None
    last: SavedWeights
    best: list[BestWeights]
    written: list[str]


def summary_table(summary: Summary) -> Table:
    """The summary as a rich table."""
    table = Table(title="summary", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    if summary.stopped is not None:
        table.add_row("stopped by", summary.stopped)
    if summary.hooks:
        table.add_row("hook points", ", ".join(summary.hooks))
    speed = summary.tokens_per_second
    steps, since = summary.steps - summary.since_step, summary.since_step
    rest = f" since step {since:,}; the checkpoint does not count those before" if since else ""
    table.add_row("tokens", f"{summary.tokens:,} in {steps:,} steps{rest}")
    table.add_row("tokens/s", f"{speed:,.0f}" if speed else "not measured")
    for row in _metric_rows(summary):
        table.add_row(*row)
    if summary.figures is not None and summary.figures != summary.last:
        table.add_row("weights of these figures", str(summary.figures))
        table.add_row("last weights", str(summary.last))
    else:
        table.add_row("weights", str(summary.last))
    for best in summary.best:
        table.add_row(f"best {best.monitor}", str(best))
    if summary.written:
        table.add_row("written", _shown_paths([Path(path) for path in summary.written]))
    return table


def _metric_rows(summary: Summary) -> Iterator[tuple[str, str]]:
    metrics = summary.metrics
    for name, heading, shape in _METRICS:
        for suffix in _suffixes(metrics, name):
            text = shape.format(metrics[name + suffix])
            rows = metrics.get(f"val/rows{suffix}")
            if name == "val/dead_fraction" and rows is not None:
                whole = "all " if summary.val_rows is not None and rows < summary.val_rows else ""
                text += f" (fired on none of {whole}{int(rows):,} held-out rows)"
            yield heading + suffix.replace("/", " ", 1), text
    if not _suffixes(metrics, "val/fvu"):
        yield "held-out FVU", "not measured: no validation ran"


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
