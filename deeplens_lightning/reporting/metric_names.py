"""The names that SAEBench, SAELens and Neuronpedia give to the metrics that a run logs.

In: logged metrics. Out: the same figures under the others' names, for `summary.json`. `docs/pages/metrics.md` defines
each metric and says where definitions differ.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Categories = dict[str, dict[str, float]]
"""Figures by category and name."""


def saebench_metrics(metrics: Mapping[str, float], sae: str = "") -> Categories:
    """The figures of one SAE as in the results of SAEBench's "core" evaluation, as far as the run measured them.

    SAELens's `evals` has the same categories and names (without `misc_metrics`).

    Args:
        metrics: logged metrics by name, such as "val/fvu".
        sae: name of an SAE of a grid; "" for a single SAE.
    """
    found = {
        name: metrics[key]
        for name in _LOGGED
        if (key := f"val/{name}/{sae}" if sae else f"val/{name}") in metrics
    }
    categories: Categories = {}
    for category, names in _NAMES.items():
        figures = {theirs: found[ours] for theirs, ours in names.items() if ours in found}
        if figures:
            categories[category] = figures
    if "fvu" in found:
        categories.setdefault("reconstruction_quality", {})["explained_variance"] = 1 - found["fvu"]
    if "dead_fraction" in found:
        categories["misc_metrics"] = {"frac_alive": 1 - found["dead_fraction"]}
    if found.get("kl_zero"):
        score = 1 - found["kl"] / found["kl_zero"]
        categories["model_behavior_preservation"]["kl_div_score"] = score
    return categories


def neuronpedia_metrics(metrics: Mapping[str, float], sae: str = "") -> dict[str, float]:
    """The same under the names of Neuronpedia, which shows SAEBench's figures as "core.<category>.<name>".

    Args:
        metrics: logged metrics by name, such as "val/fvu".
        sae: name of an SAE of a grid; "" for a single SAE.
    """
    return {
        f"core.{category}.{name}": value
        for category, figures in saebench_metrics(metrics, sae).items()
        for name, value in figures.items()
    }


def by_other_names(metrics: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """The figures of every SAE under the names of SAEBench and Neuronpedia; a grid's by name of the SAE.

    Args:
        metrics: logged metrics by name, such as "val/fvu", or "val/fvu/k32" in a grid.
    """
    saes = [
        name.removeprefix("val/fvu").removeprefix("/") for name in metrics if re.match("val/fvu(/|$)", name)
    ]
    kinds: dict[str, Callable[..., dict[str, Any]]] = {
        "saebench": saebench_metrics,
        "neuronpedia": neuronpedia_metrics,
    }
    return {
        kind: named(metrics) if saes in ([], [""]) else {sae: named(metrics, sae) for sae in saes}
        for kind, named in kinds.items()
    }


_NAMES = {
    "model_behavior_preservation": {"kl_div_with_sae": "kl", "kl_div_with_ablation": "kl_zero"},
    "model_performance_preservation": {
        "ce_loss_score": "ce_recovered",
        "ce_loss_with_ablation": "ce_zero",
        "ce_loss_with_sae": "ce_sae",
        "ce_loss_without_sae": "ce_clean",
    },
    "reconstruction_quality": {"mse": "mse", "cossim": "cosine"},
    "shrinkage": {"relative_reconstruction_bias": "shrinkage"},
    "sparsity": {"l0": "l0"},
}
_LOGGED = ("fvu", "dead_fraction", *(ours for names in _NAMES.values() for ours in names.values()))
