"""Figures have the right shape and values, draw any text, and need no display."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from deeplens_lightning.reporting.figures import (
    plot_activation_heatmap,
    plot_firing_histogram,
    plot_sample,
    plot_top_latents,
)

AWKWARD = [
    "Ġcat",
    "\n",
    "\x00",
    "שלום",
    "مرحبا",
    "\u202eevil",
    "😀",
    "👨‍👩‍👧",
    "漢字",
    "$\\frac{",
    "\ud800",
    "",
]


def _is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 2000


def test_heatmap_draws_at_most_100_evenly_sampled_dimensions_centred_on_zero() -> None:
    activations = torch.randn(5, 768, generator=torch.Generator().manual_seed(0))
    figure = plot_activation_heatmap(activations, list("abcde"), "five")
    image = figure.axes[0].images[0]
    dims = np.linspace(0, 767, 100, dtype=int)
    assert np.array_equal(np.asarray(image.get_array()), activations[:, dims].numpy())
    low, high = image.get_clim()
    assert low == -high == -activations[:, dims].abs().max()
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list("abcde")
    assert figure.axes[0].get_title() == "five"
    assert figure.axes[0].get_xlabel() == "Hidden Dimensions (sampled)"


def test_narrow_activations_are_drawn_whole() -> None:
    figure = plot_activation_heatmap(torch.ones(2, 7), ["a", "b"])
    assert figure.axes[0].images[0].get_array().shape == (2, 7)  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_heatmaps_take_every_float_dtype_and_numpy(dtype: torch.dtype) -> None:
    rows = torch.randn(2, 8, dtype=dtype)
    assert isinstance(plot_activation_heatmap(rows, ["a", "b"]), Figure)
    assert isinstance(plot_activation_heatmap(rows.float().numpy(), ["a", "b"]), Figure)


@pytest.mark.filterwarnings("error")
def test_any_text_is_drawn_without_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "awkward.png"
    figure = plot_activation_heatmap(torch.randn(len(AWKWARD), 8), AWKWARD, "\x1b[31m 😀 $x_$\n漢", path=path)
    assert _is_png(path)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[1:3] == ["⏎", "<U+0000>"]
    assert labels[5] == "<U+202E>evil"
    assert len(labels) == len(AWKWARD)


@pytest.mark.filterwarnings("error")
def test_values_that_are_not_finite_are_grey_and_counted(tmp_path: Path) -> None:
    rows = torch.randn(4, 6)
    rows[0, 0], rows[1, 1], rows[2, 2] = float("nan"), float("inf"), float("-inf")
    figure = plot_activation_heatmap(rows, list("abcd"), "t", path=tmp_path / "a.png")
    assert np.ma.getmaskarray(figure.axes[0].images[0].get_array()).sum() == 3  # type: ignore[no-untyped-call]
    assert "3 values are not finite" in figure.axes[0].get_title()
    plot_activation_heatmap(torch.full((2, 3), float("nan")), ["a", "b"], path=tmp_path / "b.png")
    plot_activation_heatmap(torch.zeros(2, 3), ["a", "b"], path=tmp_path / "c.png")
    assert _is_png(tmp_path / "b.png")


def test_the_wrong_shape_says_what_to_pass() -> None:
    with pytest.raises(
        ValueError, match=r"got shape \(1, 2, 8\); for one text of a batch pass activations\[0\]"
    ):
        plot_activation_heatmap(torch.randn(1, 2, 8), ["a", "b"])
    with pytest.raises(ValueError, match="2 rows and there are 3 tokens"):
        plot_activation_heatmap(torch.randn(2, 8), ["a", "b", "c"])
    with pytest.raises(ValueError, match="at least one of each"):
        plot_activation_heatmap(torch.randn(0, 8), [])


def test_top_latents_are_the_strongest_ones_in_reading_order() -> None:
    latents = torch.zeros(3, 50)
    latents[2, 7], latents[0, 40], latents[1, 3], latents[1, 9] = 5.0, 4.0, 3.0, 0.1
    figure = plot_top_latents(latents, ["a", "b", "c"], n_latents=3)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["40", "3", "7"]
    image = np.asarray(figure.axes[0].images[0].get_array())
    assert np.array_equal(image, latents[:, [40, 3, 7]].numpy())


@pytest.mark.filterwarnings("error")
def test_sample_has_one_panel_per_metric_and_the_latents(tmp_path: Path) -> None:
    n = len(AWKWARD)
    figure = plot_sample(
        AWKWARD,
        {"norm": torch.rand(n), "error": torch.full((n,), float("nan"))},
        torch.rand(n, 4),
        [1, 20, 300, 4000],
        "step 5",
        path=tmp_path / "s.png",
    )
    assert [axes.get_title() for axes in figure.axes[:2]] == ["norm", "error"]
    assert [label.get_text() for label in figure.axes[2].get_xticklabels()] == ["1", "20", "300", "4000"]
    assert _is_png(tmp_path / "s.png")


def test_a_sample_on_which_no_latent_fires_has_bars_alone() -> None:
    figure = plot_sample(["a", "b"], {"norm": torch.rand(2), "L0": torch.zeros(2)}, torch.zeros(2, 0), [])
    assert [axes.get_title() for axes in figure.axes] == ["norm", "L0"]


@pytest.mark.filterwarnings("error")
def test_firing_histogram_counts_the_latents_that_never_fired(tmp_path: Path) -> None:
    figure = plot_firing_histogram(torch.tensor([0.0, 0.0, 0.1, 0.01, 1.0]), path=tmp_path / "f.png")
    assert "2 of 5 never fired" in figure.axes[0].get_title()
    plot_firing_histogram(torch.zeros(5), path=tmp_path / "g.png")
    assert _is_png(tmp_path / "g.png")


def test_plotting_needs_no_display_and_never_imports_pyplot(tmp_path: Path) -> None:
    script = (
        "import sys, torch\n"
        "from deeplens_lightning.reporting.figures import plot_activation_heatmap\n"
        f"plot_activation_heatmap(torch.randn(2, 4), ['a', 'b'], path={str(tmp_path / 'a.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    environment = {"PATH": "/usr/bin:/bin", "MPLBACKEND": "TkAgg", "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, timeout=600)
    assert _is_png(tmp_path / "a.png")


def test_a_notebook_shows_a_figure_as_a_picture_without_pyplot() -> None:
    script = (
        "import sys, torch\n"
        "from deeplens_lightning.reporting.figures import plot_activation_heatmap, plot_firing_histogram\n"
        "figures = plot_activation_heatmap(torch.randn(2, 4), ['a', 'b']), plot_firing_histogram(torch.rand(9))\n"
        "for figure in figures:\n"
        "    png = figure._repr_png_()\n"  # what IPython calls on the value of a cell
        "    width, height = (int.from_bytes(png[at : at + 4], 'big') for at in (16, 20))\n"
        "    assert png.startswith(b'\\x89PNG')\n"
        "    assert [width, height] == [round(100 * inches) for inches in figure.get_size_inches()]\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=600)
