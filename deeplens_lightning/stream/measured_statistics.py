"""Constants measured on activations before the first step: the normalisation, and the limit on norms.

In: training documents and the frozen model. Out: a `Scaling` and a norm limit for each hook point, the same on
all ranks; they are kept in checkpoints and never estimated again.
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
from deeplens_lightning.text.packing import model_batches
from deeplens_lightning.text.pipeline import TextStage

ROWS = 32_768
"""Rows measured, over all ranks."""
SAMPLE_EPOCH = 2**20
"""Number of the epoch whose order the sample is taken from: no epoch of training has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """The measured constants, by hook point.

    Attributes:
        scalings: the normalisation.
        max_norms: rows with a larger norm are dropped; empty without an outlier filter.
    """

    scalings: dict[str, Scaling]
    max_norms: dict[str, float]


def measure(
    model: FrozenModel,
    text: TextStage,
    size: int,
    *,
    normalize: Normalize,
    max_norm_ratio: float | None,
    progress: bool,
) -> Statistics:
    """Measure rows of documents from all over the training split. All ranks must call it together.

    Args:
        model: as in training.
        text: this rank's training text.
        size: blocks a model batch.
        normalize: the property that the scalings give to rows.
        max_norm_ratio: drop rows whose norm is above this multiple of the median norm; None for no filter.
        progress: show a bar.

    Raises:
        ValueError: there are no rows, or none that vary.
    """
    sampled = [
        {name: x.cpu() for name, x in rows.items()}
        for rows in _sample(model, text, size, ROWS // text.documents.ranks, progress)
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
    model: FrozenModel, text: TextStage, size: int, wanted: int, progress: bool
) -> Iterator[dict[str, Tensor]]:
    bar = tqdm(
        total=wanted,
        desc="activation statistics",
        unit="row",
        unit_scale=True,
        disable=not progress,
        leave=False,
    )
    chunks = text.packing.chunks(text.tokenized(SAMPLE_EPOCH))
    batches = chain.from_iterable(
        (chunk.blocks.select(index) for index in model_batches(chunk.blocks, size, model.isolation))
        for chunk in chunks
    )
    with bar:
        for blocks in batches:
            batch = run_model(model, blocks)
            yield batch.rows()
            bar.update(len(batch.kept))
            if (wanted := wanted - len(batch.kept)) <= 0:
                return
