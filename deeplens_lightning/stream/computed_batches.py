"""Run the model on groups of shuffled blocks, one model batch after another.

In: groups of shuffled blocks, and a place to begin. Out: model batches without the rows above the norm limits, each with
its place, so that it can be computed ahead of its use in another thread.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deeplens_lightning.devices import on_device
from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.model.rows import ModelBatch, run_model
from deeplens_lightning.stream.rotating_shuffle import Mixed
from deeplens_lightning.text.packing import Blocks, model_batches
from deeplens_lightning.types import BlockPosition


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputedBatch:
    """A model batch and its place.

    Attributes:
        group: position of its group of blocks.
        number: number of the model batch in the group.
        out: the rows and their provenance.
        tokens: number of tokens that the model read.
        outliers: number of rows that were left out for their norm.
    """

    group: BlockPosition
    number: int
    out: ModelBatch
    tokens: int
    outliers: int

    def tensors(self) -> list[Tensor]:
        """The tensors on the model's device."""
        return list(self.out.activations.values())


def computed_batches(
    model: FrozenModel,
    groups: Iterator[Mixed[BlockPosition]],
    size: int,
    max_norms: Mapping[str, float],
    first: int,
) -> Generator[ComputedBatch, None, None]:
    """Iterate over the model batches of the groups.

    Args:
        model: the frozen model.
        groups: groups of shuffled blocks.
        size: blocks per model batch.
        max_norms: by hook point, the largest norm of a row; rows above it are left out.
        first: number of the model batch of the first group to begin with.
    """
    for mixed in groups:
        group = replace(mixed.start, window=mixed.window, skip=mixed.step)
        blocks = Blocks.of(mixed.tensors)
        batches = model_batches(blocks, size, model.isolation)
        for number, index in enumerate(batches):
            if number < first:
                continue
            chosen = blocks.select(index)
            out = run_model(model, chosen)
            fine = _within(out, max_norms) if max_norms else None
            yield ComputedBatch(
                group=group,
                number=number,
                out=out
                if fine is None
                else replace(out, kept=out.kept[fine], provenance=out.provenance[fine]),
                tokens=int((chosen.positions >= 0).sum()),
                outliers=0 if fine is None else int(len(fine) - fine.sum()),
            )
        first = 0


def _within(out: ModelBatch, max_norms: Mapping[str, float]) -> Tensor:
    """Whether each kept row is within the norm limit of every hook point: bool `(rows,)` on the CPU."""
    fine = torch.ones(len(out.kept), dtype=torch.bool)
    for name, limit in max_norms.items():
        x = out.activations[name]
        fine &= (x.index_select(0, on_device(out.kept, x.device)).float().norm(dim=1) <= limit).cpu()
    return fine
