"""Figures under the names of SAEBench, SAELens and Neuronpedia."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from deeplens_lightning.reporting.metric_names import by_other_names, neuronpedia_metrics, saebench_metrics

LOGGED = {
    "val/fvu": 0.25, "val/mse": 3.0, "val/cosine": 0.9, "val/shrinkage": 1.1, "val/l0": 32.0, "val/dead_fraction": 0.125,
    "val/ce_recovered": 0.98, "val/ce_zero": 9.0, "val/ce_sae": 4.0, "val/ce_clean": 3.5, "val/kl": 0.5,
    "val/kl_zero": 2.0, "train/fvu": 0.5, "val/rows": 100.0,
}  # fmt: skip
DOCS = Path(__file__).parents[2] / "docs" / "pages" / "metrics.md"


def test_every_figure_has_its_name_of_saebench() -> None:
    assert saebench_metrics(LOGGED) == {
        "model_behavior_preservation": {
            "kl_div_score": 0.75,
            "kl_div_with_ablation": 2.0,
            "kl_div_with_sae": 0.5,
        },
        "model_performance_preservation": {
            "ce_loss_score": 0.98,
            "ce_loss_with_ablation": 9.0,
            "ce_loss_with_sae": 4.0,
            "ce_loss_without_sae": 3.5,
        },
        "reconstruction_quality": {"explained_variance": 0.75, "mse": 3.0, "cossim": 0.9},
        "shrinkage": {"relative_reconstruction_bias": 1.1},
        "sparsity": {"l0": 32.0},
        "misc_metrics": {"frac_alive": 0.875},
    }
    assert neuronpedia_metrics(LOGGED)["core.reconstruction_quality.explained_variance"] == 0.75


def test_figures_that_were_not_measured_are_left_out() -> None:
    assert saebench_metrics({}) == {}
    assert saebench_metrics({"val/l0": 8.0, "val/fvu": 0.5}) == {
        "sparsity": {"l0": 8.0},
        "reconstruction_quality": {"explained_variance": 0.5},
    }


def test_an_sae_of_a_grid_is_chosen_by_name() -> None:
    assert saebench_metrics({"val/l0/k=8": 8.0, "val/l0/k=16": 16.0}, "k=16") == {"sparsity": {"l0": 16.0}}


def test_the_page_lists_the_same_names() -> None:
    listed = re.findall(r"^\| .*`val/\w+`.* \| `(\w+)` \| `(\w+)`", DOCS.read_text(), re.MULTILINE)
    assert {f"core.{category}.{name}" for category, name in listed} == set(neuronpedia_metrics(LOGGED))


@pytest.mark.skipif(find_spec("sae_lens") is None, reason="sae_lens is not installed")
def test_saelens_uses_the_same_names() -> None:
    spec = find_spec("sae_lens")
    assert spec is not None
    assert spec.origin is not None
    written = (Path(spec.origin).parent / "evals.py").read_text()
    for category, figures in saebench_metrics(LOGGED).items():
        if category != "misc_metrics":
            assert all(f'"{name}"' in written for name in (category, *figures)), category


def test_the_summary_holds_the_figures_of_every_sae_of_a_grid() -> None:
    assert by_other_names(LOGGED)["saebench"] == saebench_metrics(LOGGED)
    grid = {"val/fvu/a": 0.25, "val/l0/a": 8.0, "val/fvu/b": 0.5}
    assert by_other_names(grid) == {
        "saebench": {
            "a": {"sparsity": {"l0": 8.0}, "reconstruction_quality": {"explained_variance": 0.75}},
            "b": {"reconstruction_quality": {"explained_variance": 0.5}},
        },
        "neuronpedia": {
            "a": {"core.sparsity.l0": 8.0, "core.reconstruction_quality.explained_variance": 0.75},
            "b": {"core.reconstruction_quality.explained_variance": 0.5},
        },
    }
