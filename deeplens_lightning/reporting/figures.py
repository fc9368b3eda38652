"""Plot activations, latents and firing frequencies as matplotlib figures.

In: matrices and tokens. Out: `Figure` objects, which a notebook shows as pictures when a cell returns them. pyplot is
never imported, so no display is needed and no global state is changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deeplens_lightning.disk.files import write_whole
from deeplens_lightning.reporting.drawing import (
    draw_heatmap,
    drawable,
    finish,
    label_columns,
    label_tokens,
    new_figure,
    one_line,
    set_title,
    token_figure,
    token_height,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Tensor | NDArray[Any]


def plot_activation_heatmap(
    activations: Rows,
    tokens: Sequence[str],
    title: str = "Activation Heatmap",
    *,
    path: str | PathLike[str] | None = None,
    max_dims: int = 100,
) -> Figure:
    """Plot a heatmap of activations: one row for each token, one column for each sampled dimension.

    Args:
        activations: `(seq_length, hidden_dim)` of one text, with any float dtype and device.
        tokens: `seq_length` strings.
        title: title of the figure, shown without mathematical markup.
        path: file to save the figure to; the ending chooses the format (`.png`, `.svg`, `.pdf`).
        max_dims: largest number of dimensions drawn; they have equal distances and include the first and the last.

    Returns:
        The figure, with 0 at the middle of the colours. Values that are not finite are grey, and the title gives their
        number.

    Raises:
        ValueError: `activations` is not a matrix, or its number of rows is not the number of tokens.
    """
    values = _matrix(activations, tokens, "activations")
    n_dims = min(max_dims, values.shape[1])
    dims = np.linspace(0, values.shape[1] - 1, n_dims, dtype=int)
    figure, axes = token_figure(len(tokens), width=12)
    draw_heatmap(axes, values[:, dims], "RdBu_r", "Activation Value", centred=True)
    label_tokens(axes, tokens)
    label_columns(axes, [str(d) for d in dims], "Hidden Dimensions (sampled)")
    set_title(axes, title, values)
    return finish(figure, path)


def plot_top_latents(
    latents: Rows,
    tokens: Sequence[str],
    title: str = "Top latents",
    *,
    n_latents: int = 20,
    path: str | PathLike[str] | None = None,
) -> Figure:
    """Plot the most active latents of a text: one row for each token, one column for each latent.

    Args:
        latents: `(seq_length, d_sae)`, the output of an SAE's `encode` for one text.
        tokens: `seq_length` strings.
        title: title of the figure.
        n_latents: number of latents to draw: those with the largest activation on any token, in the order of the
            tokens where they peak.
        path: file to save the figure to.

    Raises:
        ValueError: `latents` is not a matrix, or its number of rows is not the number of tokens.
    """
    values = _matrix(latents, tokens, "latents")
    chosen = _most_active(values, n_latents)
    figure, axes = token_figure(len(tokens), width=4 + 0.35 * len(chosen))
    draw_heatmap(axes, values[:, chosen], "magma_r", "Latent activation", centred=False)
    label_tokens(axes, tokens)
    label_columns(axes, [str(i) for i in chosen], "Latent")
    set_title(axes, title, values)
    return finish(figure, path)


def plot_sample(
    tokens: Sequence[str],
    metrics: dict[str, Rows],
    latents: Rows,
    latent_ids: Sequence[int],
    title: str = "",
    *,
    path: str | PathLike[str] | None = None,
) -> Figure:
    """Plot an SAE's numbers for one text: bars for each token and metric, then a heatmap of tokens by latents.

    Args:
        tokens: `seq_length` strings.
        metrics: values `(seq_length,)` by name, e.g. norm, relative error, L0; each gets a panel of bars.
        latents: `(seq_length, n)`, activations of the latents to draw.
        latent_ids: numbers of these `n` latents; without any there is no heatmap.
        title: title of the figure.
        path: file to save the figure to.

    Raises:
        ValueError: `latents` is not a matrix, or its number of rows is not the number of tokens.
    """
    values = (
        _matrix(latents, tokens, "latents") if len(latent_ids) else np.zeros((len(tokens), 0), np.float32)
    )
    heat_width = [max(1.5, 0.35 * values.shape[1])] if len(latent_ids) else []
    widths = [1.0] * len(metrics) + heat_width
    figure = new_figure(4 + 1.1 * len(metrics) + sum(heat_width), token_height(len(tokens)))
    panels = figure.subplots(1, len(widths), sharey=True, squeeze=False, width_ratios=widths)[0]
    for axes, (name, column) in zip(panels, metrics.items(), strict=False):
        bars = _numpy(column)
        axes.barh(np.arange(len(tokens)), np.where(np.isfinite(bars), bars, 0.0), color="#4c78a8", height=0.8)
        axes.set_title(name, fontsize=9, parse_math=False)
        axes.tick_params(axis="x", labelsize=7)
        axes.margins(y=0)
    if heat_width:
        draw_heatmap(panels[-1], values, "magma_r", "Latent activation", centred=False)
        label_columns(panels[-1], [str(i) for i in latent_ids], "Latent")
        panels[-1].tick_params(axis="y", length=0)
    label_tokens(panels[0], tokens)
    figure.suptitle(drawable(one_line(title)), fontsize=11, parse_math=False)
    return finish(figure, path)


def plot_firing_histogram(
    frequencies: Rows, title: str = "Firing frequencies", *, path: str | PathLike[str] | None = None
) -> Figure:
    """Plot a histogram of latents over log10 of the fraction of rows on which they fire.

    Args:
        frequencies: `(d_sae,)`, the fraction of rows on which each latent is above 0. The logarithm of 0 does not
            exist: latents that never fired are not drawn, and the title gives their number.
        title: title of the figure.
        path: file to save the figure to.
    """
    values = _numpy(frequencies).reshape(-1)
    fired = values[np.isfinite(values) & (values > 0)]
    figure = new_figure(7, 4)
    axes = figure.subplots()
    if len(fired):
        axes.hist(np.log10(fired), bins=min(60, max(10, len(fired) // 10)), color="#4c78a8")
    axes.set_xlabel("log10 of the fraction of rows on which a latent fires")
    axes.set_ylabel("latents")
    never = len(values) - len(fired)
    axes.set_title(f"{drawable(one_line(title))} ({never} of {len(values)} never fired)", parse_math=False)
    return finish(figure, path)


def figure_pixels(figure: Figure) -> NDArray[np.uint8]:
    """Render a figure as RGBA pixels, uint8 `(height, width, 4)`; one rendering serves the file and all loggers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba()).copy()  # type: ignore[no-untyped-call]


def save_pixels(pixels: NDArray[np.uint8], path: str | PathLike[str]) -> None:
    """Write the pixels of `figure_pixels` as a PNG file; missing folders are created."""
    from matplotlib.image import imsave

    write_whole(Path(path), lambda file: imsave(file, pixels, format="png"))


def _most_active(values: NDArray[np.float32], n: int) -> NDArray[np.int64]:
    """Columns with the largest values, at most `n`, in the order of the rows where they peak."""
    finite = np.where(np.isfinite(values), values, 0.0)
    peaks = finite.max(axis=0, initial=0.0)
    chosen = np.argsort(-peaks, kind="stable")[: min(n, values.shape[1])]
    return chosen[np.lexsort((chosen, finite[:, chosen].argmax(axis=0)))]


def _matrix(rows: Rows, tokens: Sequence[str], name: str) -> NDArray[np.float32]:
    """A matrix with one row for each token, float32 on the CPU; raises ValueError for another shape."""
    values = _numpy(rows)
    if values.ndim != 2 or 0 in values.shape:
        hint = f"; for one text of a batch pass {name}[0]" if values.ndim == 3 else ""
        raise ValueError(
            f"{name} must be (seq_length, width) with at least one of each, got shape {values.shape}{hint}"
        )
    if len(tokens) != len(values):
        raise ValueError(
            f"{name} has {len(values)} rows and there are {len(tokens)} tokens: pass one token per row, "
            "special tokens included"
        )
    return values


def _numpy(rows: Rows) -> NDArray[np.float32]:
    if isinstance(rows, Tensor):
        rows = rows.detach().to("cpu", torch.float32).numpy()
    return np.asarray(rows, dtype=np.float32)
