"""A progress bar with its figures on a line of their own, so that they are whole on narrow terminals."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Group, RenderableType
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.table import Column, Table
from rich.text import Text
from typing_extensions import override

_BAR_WIDTH = 20  # with the columns beside it, a line has at most 80 characters


class FitProgressBar(RichProgressBar):
    """Lightning's `RichProgressBar` with the figures below the bar; an epoch without a last one has no "/-2"."""

    _figures = ""

    @override
    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Keep the figures for the line below the bar; none for Lightning's own column beside it."""
        found = super().get_metrics(trainer, pl_module)
        found.pop("v_num", None)
        self._figures = "  ".join(f"{name}={_number(value)}" for name, value in found.items())
        return {}

    @override
    def configure_columns(self, trainer: Trainer) -> list[ProgressColumn]:
        """Lightning's columns as one, with the figures below them."""
        columns: list[ProgressColumn] = super().configure_columns(trainer)
        for column in columns:
            if isinstance(column, BarColumn):
                column.bar_width = _BAR_WIDTH
        return [_WithFigures([_Description(), *columns[1:]], self._figures_of)]

    def _figures_of(self, task: Task) -> str:
        return self._figures if task.id == self.train_progress_bar_id else ""


def with_own_line(callback: Callback) -> Callback:
    """A `FitProgressBar` with the settings of a `RichProgressBar`; other callbacks unchanged."""
    if type(callback) is not RichProgressBar:
        return callback
    return FitProgressBar(
        refresh_rate=callback._refresh_rate,
        leave=callback._leave,
        theme=callback.theme,
        console_kwargs=callback._console_kwargs,
    )


class _Description(TextColumn):
    """The description without the last epoch where there is none: Lightning writes "Epoch 0/-2"."""

    def __init__(self) -> None:
        super().__init__("[progress.description]{task.description}")

    @override
    def render(self, task: Task) -> Text:
        text = super().render(task)
        return Text(re.sub(r"/-\d+", "", text.plain), style=text.style)


class _WithFigures(ProgressColumn):
    """Several columns in one, and a line of figures below them."""

    def __init__(self, columns: Sequence[ProgressColumn], figures: Callable[[Task], str]) -> None:
        self._columns, self._figures_of = columns, figures
        super().__init__()

    @override
    def render(self, task: Task) -> RenderableType:
        line = Table.grid(*(Column(no_wrap=True) for _ in self._columns), padding=(0, 1))
        line.add_row(*(column(task) for column in self._columns))
        figures = self._figures_of(task)
        return Group(line, Text(figures)) if figures else line


def _number(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
