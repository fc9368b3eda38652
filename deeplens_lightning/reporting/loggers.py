"""Log scalars, pictures and tables to any of Lightning's loggers.

Lightning's loggers share a method for scalars only: W&B has methods for pictures and tables, TensorBoard and MLflow need
calls to their own clients, CSV takes numbers only. Callbacks write files before they log, so a result that a logger
cannot show is still on disk. Call these functions on rank 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray

Cell = str | int | float | None
"""One cell of a table."""

_MAX_MARKDOWN_ROWS = 500
_reported: set[str] = set()  # classes of loggers for which the message about numbers was printed


def log_scalars(loggers: Iterable[Logger], values: Mapping[str, float], step: int) -> None:
    """Log numbers to every logger.

    Args:
        loggers: the Trainer's loggers.
        values: numbers by name.
        step: the Trainer's global step.
    """
    for logger in loggers:
        logger.log_metrics(dict(values), step=step)


def log_image(loggers: Iterable[Logger], name: str, pixels: NDArray[np.uint8], step: int) -> None:
    """Log one picture to every logger that shows pictures.

    Args:
        loggers: the Trainer's loggers.
        name: name of the picture, the same at every step; `/` makes groups.
        pixels: uint8 `(height, width, 3 or 4)`; a fourth channel is left out.
        step: the Trainer's global step.
    """
    pixels = pixels[..., :3]
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, pixels, global_step=step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [pixels], step=step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_image(_mlflow_run(logger), pixels, key=name, step=step)
        else:
            _report_once(logger)


def log_table(
    loggers: Iterable[Logger], name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], step: int
) -> None:
    """Log one table to every logger that shows tables.

    TensorBoard gets Markdown (the first 500 rows), W&B a `wandb.Table`, MLflow a JSON artifact
    `<name>/step_<step>.json` in the layout of its own tables (`columns`, `data`).

    Args:
        loggers: the Trainer's loggers.
        name: name of the table, the same at every step.
        columns: one heading for each column.
        rows: rows of cells, each as long as `columns`.
        step: the Trainer's global step.
    """
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(name, markdown_table(columns, rows), global_step=step)
        elif isinstance(logger, WandbLogger):
            logger.log_table(name, columns=list(columns), data=[list(row) for row in rows], step=step)
        elif isinstance(logger, MLFlowLogger):
            table = {"columns": list(columns), "data": [list(row) for row in rows]}
            logger.experiment.log_dict(_mlflow_run(logger), table, f"{name}/step_{step}.json")
        else:
            _report_once(logger)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A Markdown table of the first 500 rows; cells may hold any text, which is escaped and put on one line."""
    lines = [_markdown_row(columns), _markdown_row(["---"] * len(columns))]
    lines += [_markdown_row(row) for row in rows[:_MAX_MARKDOWN_ROWS]]
    more = len(rows) - _MAX_MARKDOWN_ROWS
    return "\n".join(lines) + (f"\n\n{more} more rows are in the run's folder." if more > 0 else "")


def _markdown_row(cells: Sequence[Cell]) -> str:
    return "| " + " | ".join(_markdown_cell(cell) for cell in cells) + " |"


def _markdown_cell(cell: Cell) -> str:
    if cell is None:
        return ""
    if isinstance(cell, float):
        return f"{cell:.4g}"
    text = " ".join(str(cell).splitlines())
    # TensorBoard renders HTML and links inside Markdown, so every character that starts markup is escaped.
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join("\\" + char if char in "\\`*_{}[]()#+!|~" else char for char in text)


def _mlflow_run(logger: MLFlowLogger) -> str:
    run_id = logger.run_id
    if run_id is None:
        raise RuntimeError(
            "MLFlowLogger has no run id: its run was not started; log from inside a Trainer run"
        )
    return run_id


def _report_once(logger: Logger) -> None:
    name = type(logger).__name__
    if name not in _reported:
        _reported.add(name)
        rank_zero_info(
            f"{name} takes numbers only: figures and tables are files in the run's folder "
            "(add a TensorBoardLogger, WandbLogger or MLFlowLogger to see them there too)."
        )
