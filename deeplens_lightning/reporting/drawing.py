"""Draw the parts of a figure: heatmaps, token labels, titles, and text that the installed fonts can show.

In: matplotlib axes, values and tokens. Out: the axes, drawn. pyplot is never imported, so no display is needed and no
global state is changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from deeplens_lightning.disk.files import write_whole
from deeplens_lightning.reporting.readable_tokens import code_point, readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MISSING = "#b8b8b8"  # values that are not finite: a grey that is in neither colour map
_MAX_TOKEN_LABELS = 64
_MAX_COLUMN_LABELS = 34
# Fonts with more scripts than matplotlib's own; each is used only where it is installed.
_FALLBACK_FONTS = (
    "Noto Sans",
    "Noto Sans CJK JP",
    "Noto Sans Hebrew",
    "Noto Sans Arabic",
    "Noto Emoji",
    "Symbola",
    "Arial Unicode MS",
)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches."""
    from deeplens_lightning.reporting.notebook_figure import NotebookFigure

    return NotebookFigure(figsize=(width, height), layout="constrained")


def token_figure(n_tokens: int, width: float) -> tuple[Figure, Axes]:
    """A figure with one axes, of that width in inches and as high as the tokens need."""
    figure = new_figure(width, token_height(n_tokens))
    return figure, figure.subplots()


def token_height(n_tokens: int) -> float:
    """Height in inches of a figure with one row for each token."""
    return min(16.0, max(3.5, 1.6 + 0.24 * n_tokens))


def draw_heatmap(axes: Axes, values: NDArray[np.float32], colours: str, label: str, *, centred: bool) -> None:
    """Draw a matrix as an image with a colour bar.

    Args:
        axes: where to draw.
        values: `(rows, columns)`; values that are not finite are drawn grey.
        colours: name of a matplotlib colour map.
        label: label of the colour bar.
        centred: put 0 at the middle of the colours; otherwise the smallest value (0 if none is negative) is at their
            start.
    """
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
        norm = PowerNorm(0.5, 0.0, top)  # square root: small activations stay visible beside a huge one
    image = axes.imshow(
        np.ma.masked_invalid(values),
        cmap=colormaps[colours].with_extremes(bad=_MISSING),
        norm=norm,
        aspect="auto",
        interpolation="nearest",
    )
    assert axes.figure is not None
    axes.figure.colorbar(image, ax=axes, label=label)


def label_tokens(axes: Axes, tokens: Sequence[str]) -> None:
    """Label the rows with tokens, from top to bottom; with too many tokens only every n-th one is labelled."""
    every = -(-len(tokens) // _MAX_TOKEN_LABELS)
    places = list(range(0, len(tokens), every))
    labels = [drawable(readable(tokens[i])) for i in places]
    axes.set_yticks(places, [one_line(label, limit=30) for label in labels], parse_math=False)
    axes.set_ylim(len(tokens) - 0.5, -0.5)
    axes.set_ylabel("Tokens")


def label_columns(axes: Axes, labels: Sequence[str], name: str) -> None:
    """Label the columns, and name what they are; with too many columns only every n-th one is labelled."""
    every = -(-len(labels) // _MAX_COLUMN_LABELS)
    places = list(range(0, len(labels), every))
    axes.set_xticks(places, [labels[i] for i in places], rotation=45, ha="right", rotation_mode="anchor")
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel(name)


def set_title(axes: Axes, title: str, values: NDArray[np.float32]) -> None:
    """Set the title, with the number of values that are not finite if there are any."""
    bad = int((~np.isfinite(values)).sum())
    note = f" [{bad} values are not finite: grey]" if bad else ""
    axes.set_title(drawable(one_line(title)) + note, parse_math=False)


def one_line(text: str, limit: int = 110) -> str:
    """The text on one line, cut to `limit` characters, with control characters visible."""
    line = readable(" ".join(text.split()), max_chars=10 * len(text) + 1)
    return line if len(line) <= limit else line[: limit - 1] + "…"


def drawable(text: str) -> str:
    """The text with every character that no installed font can draw replaced by its code point."""
    maps = _charmaps()
    return "".join(c if any(ord(c) in known for known in maps) else code_point(c) for c in text)


def finish(figure: Figure, path: str | PathLike[str] | None) -> Figure:
    """Set the fonts of all text, save the figure if a path is given, and return it."""
    from matplotlib.text import Text

    families = _font_families()
    for item in figure.findobj(Text):
        assert isinstance(item, Text)
        item.set_fontfamily(list(families))
    if path is not None:
        target = Path(path) if Path(path).suffix else Path(f"{path}.png")
        write_whole(target, lambda file: figure.savefig(file, dpi=100, format=target.suffix[1:]))
    return figure


@lru_cache(maxsize=1)
def _font_families() -> tuple[str, ...]:
    from matplotlib import font_manager

    here = {font.name for font in font_manager.fontManager.ttflist}
    return ("DejaVu Sans", *(name for name in _FALLBACK_FONTS if name in here))


@lru_cache(maxsize=1)
def _charmaps() -> tuple[frozenset[int], ...]:
    """Code points that each font of `_font_families` can draw."""
    from matplotlib import font_manager, ft2font

    files = (font_manager.findfont(name) for name in _font_families())
    return tuple(frozenset(ft2font.FT2Font(file).get_charmap()) for file in files)
