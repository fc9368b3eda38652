"""Figures only: matrices and tokens in, matplotlib `Figure` objects out.

Nothing here touches pyplot, its global state or a display: a figure is an object, drawn by the
Agg canvas when it is saved, and shown by a notebook because it is returned.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deeplens_lightning.reporting.readable_tokens import code_point, readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Tensor | NDArray[Any]

_MISSING = "#b8b8b8"  # what is not a number: grey, which neither colour map contains
_MAX_LABELS = 64
# Fonts that know more scripts than matplotlib's own; used only where the machine has them.
_FALLBACK_FONTS = (
    "Noto Sans",
    "Noto Sans CJK JP",
    "Noto Sans Hebrew",
    "Noto Sans Arabic",
    "Noto Emoji",
    "Symbola",
    "Arial Unicode MS",
)


def plot_activation_heatmap(
    activations: Rows,
    tokens: Sequence[str],
    title: str = "Activation Heatmap",
    *,
    path: str | PathLike[str] | None = None,
    max_dims: int = 100,
) -> Figure:
    """Tokens down, evenly sampled dimensions across, colours centred on 0.

    Args:
        activations: `(seq_length, hidden_dim)` of one text, any float dtype and device.
        tokens: `seq_length` strings.
        title: the figure's title, shown as it is (no mathematical markup).
        path: where to save it too; the ending chooses the format (`.png`, `.svg`, `.pdf`).
        max_dims: at most so many dimensions are drawn, the first and last among them.

    Returns:
        The figure. Values that are not finite are drawn grey and counted in the title.

    Raises:
        ValueError: `activations` is not a matrix, or has another number of rows than `tokens`.
    """
    values = _matrix(activations, tokens, "activations")
    n_dims = min(max_dims, values.shape[1])
    dims = np.linspace(0, values.shape[1] - 1, n_dims, dtype=int)
    figure, axes = _token_figure(len(tokens), width=12)
    _draw_heatmap(axes, values[:, dims], "RdBu_r", "Activation Value", centred=True)
    _label_tokens(axes, tokens)
    _label_columns(axes, [str(d) for d in dims], "Hidden Dimensions (sampled)")
    _set_title(axes, title, values)
    return _finish(figure, path)


def plot_top_latents(
    latents: Rows,
    tokens: Sequence[str],
    title: str = "Top latents",
    *,
    n_latents: int = 20,
    path: str | PathLike[str] | None = None,
) -> Figure:
    """Tokens down, the latents that fire strongest on this text across.

    Args:
        latents: `(seq_length, d_sae)`, what an SAE's `encode` gives for one text.
        tokens: `seq_length` strings.
        title: the figure's title.
        n_latents: how many latents to draw, those with the largest activation on any token,
            in the order of the token where each peaks.
        path: where to save it too.

    Raises:
        ValueError: as `plot_activation_heatmap`.
    """
    values = _matrix(latents, tokens, "latents")
    chosen = _strongest(values, n_latents)
    figure, axes = _token_figure(len(tokens), width=4 + 0.35 * len(chosen))
    _draw_heatmap(axes, values[:, chosen], "magma_r", "Latent activation", centred=False)
    _label_tokens(axes, tokens)
    _label_columns(axes, [str(i) for i in chosen], "Latent")
    _set_title(axes, title, values)
    return _finish(figure, path)


def plot_sample(
    tokens: Sequence[str],
    metrics: dict[str, Rows],
    latents: Rows,
    latent_ids: Sequence[int],
    title: str = "",
    *,
    path: str | PathLike[str] | None = None,
) -> Figure:
    """One text as an SAE sees it: a bar per token for each metric, then tokens × latents.

    Args:
        tokens: `seq_length` strings.
        metrics: columns of bars, name to `(seq_length,)`, e.g. norm, relative error, L0.
        latents: `(seq_length, n)` values of the latents to draw.
        latent_ids: their `n` numbers; with none of them there is no panel of latents.
        title: the figure's title.
        path: where to save it too.

    Raises:
        ValueError: as `plot_activation_heatmap`.
    """
    values = (
        _matrix(latents, tokens, "latents") if len(latent_ids) else np.zeros((len(tokens), 0), np.float32)
    )
    heat_width = [max(1.5, 0.35 * values.shape[1])] if len(latent_ids) else []
    widths = [1.0] * len(metrics) + heat_width
    figure = _new_figure(4 + 1.1 * len(metrics) + sum(heat_width), _height(len(tokens)))
    panels = figure.subplots(1, len(widths), sharey=True, squeeze=False, width_ratios=widths)[0]
    for axes, (name, column) in zip(panels, metrics.items(), strict=False):
        bars = _numpy(column)
        axes.barh(np.arange(len(tokens)), np.where(np.isfinite(bars), bars, 0.0), color="#4c78a8", height=0.8)
        axes.set_title(name, fontsize=9, parse_math=False)
        axes.tick_params(axis="x", labelsize=7)
        axes.margins(y=0)
    if heat_width:
        _draw_heatmap(panels[-1], values, "magma_r", "Latent activation", centred=False)
        _label_columns(panels[-1], [str(i) for i in latent_ids], "Latent")
        panels[-1].tick_params(axis="y", length=0)
    _label_tokens(panels[0], tokens)
    figure.suptitle(_drawable(_one_line(title)), fontsize=11, parse_math=False)
    return _finish(figure, path)


def plot_firing_histogram(
    frequencies: Rows, title: str = "Firing frequencies", *, path: str | PathLike[str] | None = None
) -> Figure:
    """How often each latent fires: a histogram over log10 of the fraction of rows.

    Args:
        frequencies: `(d_sae,)`, the fraction of rows on which each latent is above 0. Latents that
            never fired have no logarithm; they are counted in the legend instead of drawn.
        title: the figure's title.
        path: where to save it too.
    """
    values = _numpy(frequencies).reshape(-1)
    fired = values[np.isfinite(values) & (values > 0)]
    figure = _new_figure(7, 4)
    axes = figure.subplots()
    if len(fired):
        axes.hist(np.log10(fired), bins=min(60, max(10, len(fired) // 10)), color="#4c78a8")
    axes.set_xlabel("log10 of the fraction of rows on which a latent fires")
    axes.set_ylabel("latents")
    never = len(values) - len(fired)
    axes.set_title(f"{_drawable(_one_line(title))} ({never} of {len(values)} never fired)", parse_math=False)
    return _finish(figure, path)


def figure_pixels(figure: Figure) -> NDArray[np.uint8]:
    """The figure as `(height, width, 4)` uint8 RGBA: one rendering for loggers and file alike."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba()).copy()  # type: ignore[no-untyped-call]


def save_pixels(pixels: NDArray[np.uint8], path: str | PathLike[str]) -> None:
    """Write what `figure_pixels` gave as a PNG file; missing folders are made."""
    from matplotlib.image import imsave

    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    imsave(target, pixels, format="png")


def _strongest(values: NDArray[np.float32], n: int) -> NDArray[np.int64]:
    finite = np.where(np.isfinite(values), values, 0.0)
    peaks = finite.max(axis=0, initial=0.0)
    chosen = np.argsort(-peaks, kind="stable")[: min(n, values.shape[1])]
    return chosen[np.lexsort((chosen, finite[:, chosen].argmax(axis=0)))]


def _draw_heatmap(
    axes: Axes, values: NDArray[np.float32], colours: str, label: str, *, centred: bool
) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import Normalize, PowerNorm

    finite = values[np.isfinite(values)]
    top = float(np.abs(finite).max()) if len(finite) else 1.0
    top = top or 1.0
    bottom = float(finite.min()) if len(finite) else 0.0
    if centred:
        norm = Normalize(-top, top)
    elif bottom < 0:
        norm = Normalize(bottom, top)
    else:
        norm = PowerNorm(0.5, 0.0, top)  # a square root: one huge activation must not hide all others
    image = axes.imshow(
        np.ma.masked_invalid(values),
        cmap=colormaps[colours].with_extremes(bad=_MISSING),
        norm=norm,
        aspect="auto",
        interpolation="nearest",
    )
    assert axes.figure is not None
    axes.figure.colorbar(image, ax=axes, label=label)


def _label_tokens(axes: Axes, tokens: Sequence[str]) -> None:
    every = -(-len(tokens) // _MAX_LABELS)
    places = list(range(0, len(tokens), every))
    labels = [_drawable(readable(tokens[i])) for i in places]
    axes.set_yticks(places, [_one_line(label, limit=30) for label in labels], parse_math=False)
    axes.set_ylim(len(tokens) - 0.5, -0.5)
    axes.set_ylabel("Tokens")


def _label_columns(axes: Axes, labels: Sequence[str], name: str) -> None:
    every = -(-len(labels) // 34)
    places = list(range(0, len(labels), every))
    axes.set_xticks(places, [labels[i] for i in places], rotation=45, ha="right", rotation_mode="anchor")
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel(name)


def _set_title(axes: Axes, title: str, values: NDArray[np.float32]) -> None:
    bad = int((~np.isfinite(values)).sum())
    note = f" [{bad} values are not finite: grey]" if bad else ""
    axes.set_title(_drawable(_one_line(title)) + note, parse_math=False)


def _one_line(text: str, limit: int = 110) -> str:
    line = readable(" ".join(text.split()), max_chars=10 * len(text) + 1)
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _matrix(rows: Rows, tokens: Sequence[str], name: str) -> NDArray[np.float32]:
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


def _new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _token_figure(n_tokens: int, width: float) -> tuple[Figure, Axes]:
    figure = _new_figure(width, _height(n_tokens))
    return figure, figure.subplots()


def _height(n_tokens: int) -> float:
    return min(16.0, max(3.5, 1.6 + 0.24 * n_tokens))


def _finish(figure: Figure, path: str | PathLike[str] | None) -> Figure:
    from matplotlib.text import Text

    families = _font_families()
    for item in figure.findobj(Text):
        assert isinstance(item, Text)
        item.set_fontfamily(list(families))
    if path is not None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=100)
    return figure


@lru_cache(maxsize=1)
def _font_families() -> tuple[str, ...]:
    from matplotlib import font_manager

    here = {font.name for font in font_manager.fontManager.ttflist}
    return ("DejaVu Sans", *(name for name in _FALLBACK_FONTS if name in here))


@lru_cache(maxsize=1)
def _charmaps() -> tuple[frozenset[int], ...]:
    from matplotlib import font_manager, ft2font

    files = (font_manager.findfont(name) for name in _font_families())
    return tuple(frozenset(ft2font.FT2Font(file).get_charmap()) for file in files)


def _drawable(text: str) -> str:
    """`text` with every character that no installed font can draw written as its code point."""
    maps = _charmaps()
    return "".join(c if any(ord(c) in known for known in maps) else code_point(c) for c in text)
