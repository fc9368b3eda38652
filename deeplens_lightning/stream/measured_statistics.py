"""Measure the normalisation and the norm limits of activations on a sample, before the first training step.

In: training documents and the frozen model. Out: a `Scaling` and a norm limit for each hook point. Every rank measures
the same rows, so that no rank has to wait for the others. They are saved in checkpoints, so a resumed run does not
measure them again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from tqdm.auto import tqdm

from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.model.rows import run_model
from deeplens_lightning.normalization import Moments, Normalize, Scaling
from deeplens_lightning.text.packing import model_batches
from deeplens_lightning.text.pipeline import TextStage

ROWS = 32_768
"""Number of rows in the sample."""
SAMPLE_EPOCH = 2**20
"""Epoch number for the order of documents in the sample, larger than any epoch number of training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """Normalisation and norm limits, by hook point.

    Attributes:
        scalings: the normalisation.
        max_norms: the largest norm of a row, rows above it are dropped; empty without an outlier filter.
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
    """Measure normalisation and norm limits on about `ROWS` rows from random documents of the training split.

    Only sums are kept of the rows, and their norms where the median norm is needed. With both a normalisation and
    `max_norm_ratio` the rows themselves are kept too, once, in the activation dtype: which of them count is known only
    after the last one.

    Args:
        model: the frozen model.
        text: the training text of all ranks.
        size: blocks per model batch.
        normalize: the kind of normalisation.
        max_norm_ratio: drop rows whose norm is above this multiple of the median norm; None for no filter.
        progress: whether to show a progress bar.

    Raises:
        ValueError: there are no rows, or all rows are equal.
    """
    widths = {point.name: point.d_in for point in model.hook_points}
    moments = {name: Moments(d_in) for name, d_in in widths.items()}
    norms: dict[str, list[Tensor]] = {name: [] for name in widths}
    waiting: deque[dict[str, Tensor]] = deque()
    for rows in _sample(model, text, size, ROWS, progress):
        here = {name: x.cpu() for name, x in rows.items()}
        if max_norm_ratio is None:
            _add(moments, here)
            continue
        for name, x in here.items():
            norms[name].append(x.float().norm(dim=1))
        if normalize != "none":
            waiting.append(here)
    max_norms = {} if max_norm_ratio is None else _limits(norms, max_norm_ratio)
    for number in range(len(waiting)):
        rows = waiting.popleft()
        fine = torch.stack([norms[name][number] <= limit for name, limit in max_norms.items()]).all(0)
        _add(moments, {name: x[fine] for name, x in rows.items()})
    scalings = {name: each.scaling(normalize) for name, each in moments.items()}
    return Statistics(scalings=scalings, max_norms=max_norms)


def _add(moments: Mapping[str, Moments], rows: Mapping[str, Tensor]) -> None:
    for name, x in rows.items():
        moments[name].update(x)


def _limits(norms: Mapping[str, Sequence[Tensor]], ratio: float) -> dict[str, float]:
    """`ratio` times the median of the norms, by hook point."""
    limits = {}
    for name, here in norms.items():
        everyone = torch.cat([torch.empty(0, dtype=torch.float32), *here])
        if len(everyone) == 0:
            raise ValueError(
                "max_norm_ratio needs rows to measure norms on, but the training text is empty; give a dataset with "
                "text, or leave max_norm_ratio out"
            )
        limits[name] = ratio * float(everyone.median())
    return limits


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
