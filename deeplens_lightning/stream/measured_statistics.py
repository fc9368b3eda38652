"""What is measured on the activations before the first step: normalisation, and the limit on norms.

In: training documents and the frozen model. Out: a `Scaling` and a norm limit for each hook point, the same on
all ranks, never estimated again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from tqdm.auto import tqdm

from deeplens_lightning.distributed import gather, sum_in_rank_order
from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.model.rows import run_model
from deeplens_lightning.normalization import Moments, Normalize, Scaling
from deeplens_lightning.text.documents import Documents
from deeplens_lightning.text.packing import Packing, model_batches

ROWS = 32_768
"""Rows looked at, over all ranks."""
SAMPLE_EPOCH = 2**20
"""The order in which documents are sampled: another one than any epoch of training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """The measured constants, by hook point.

    Attributes:
        scalings: see `scaling.Scaling`.
        max_norms: rows with a larger norm are dropped; empty without an outlier filter.
    """

    scalings: dict[str, Scaling]
    max_norms: dict[str, float]


def measure(
    model: FrozenModel,
    documents: Documents,
    packing: Packing,
    size: int,
    *,
    normalize: Normalize,
    max_norm_ratio: float | None,
    progress: bool,
) -> Statistics:
    """Look at rows of documents spread over the training split.

    Args:
        model: see `ActivationStream`.
        documents: this rank's training documents.
        packing: as in training.
        size: blocks a model batch.
        normalize: what the scalings shall bring about.
        max_norm_ratio: drop rows whose norm is above so many times the median norm.
        progress: show a bar.

    Raises:
        ValueError: there are no rows, or none that vary.
    """
    sampled = [
        {name: x.cpu() for name, x in rows.items()}
        for rows in _sample(model, documents, packing, size, ROWS // documents.ranks, progress)
    ]
    names = [point.name for point in model.hook_points]
    max_norms: dict[str, float] = {}
    if max_norm_ratio is not None:
        for name in names:
            here = (
                torch.cat([rows[name].float().norm(dim=1) for rows in sampled]) if sampled else torch.empty(0)
            )
            norms = torch.cat(gather(here))
            if len(norms) == 0:
                raise ValueError("no rows to take activation norms from: the training text is empty")
            max_norms[name] = max_norm_ratio * float(norms.median())
    scalings: dict[str, Scaling] = {}
    for point in model.hook_points:
        moments = Moments(point.d_in)
        for rows in sampled:
            fine = torch.ones(len(rows[point.name]), dtype=torch.bool)
            for name, limit in max_norms.items():
                fine &= rows[name].float().norm(dim=1) <= limit
            moments.update(rows[point.name][fine])
        moments.sums = sum_in_rank_order(moments.sums)
        scalings[point.name] = moments.scaling(normalize)
    return Statistics(scalings=scalings, max_norms=max_norms)


def _sample(
    model: FrozenModel, documents: Documents, packing: Packing, size: int, wanted: int, progress: bool
) -> Iterator[dict[str, Tensor]]:
    bar = tqdm(
        total=wanted,
        desc="activation statistics",
        unit="row",
        unit_scale=True,
        disable=not progress,
        leave=False,
    )
    chunks = packing.chunks(documents.read(SAMPLE_EPOCH))
    batches = chain.from_iterable(
        (chunk.blocks.select(index) for index in model_batches(chunk.blocks, size, model.isolation))
        for chunk in chunks
    )
    with bar:
        for blocks in batches:
            out, kept, _ = run_model(model, blocks)
            yield {name: x.index_select(0, kept.to(x.device)) for name, x in out.items()}
            bar.update(len(kept))
            if (wanted := wanted - len(kept)) <= 0:
                return
