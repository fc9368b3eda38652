"""The batches of one epoch of a cache by step number: a map-style dataset for a plain `DataLoader`.

In: a step number. Out: a `Served` with rows gathered from the shards.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from deeplens_lightning.shards.gather import Gatherer
from deeplens_lightning.shards.order import Order
from deeplens_lightning.shards.rowset import RowSet
from deeplens_lightning.types import Served, ShardPosition


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochPlan:
    """Sizes of the batches from a position to the end of its epoch; the same for every rank.

    Attributes:
        rows: number of rows of all ranks after the position.
        full: number of batches of `batch_size` rows for each rank.
        tail: rows in the smaller last batch of each rank; 0 if there is none.
        batch_size: rows in a full batch of each rank.
        world_size: number of ranks that take turns.
    """

    rows: int
    full: int
    tail: int
    batch_size: int
    world_size: int

    @property
    def steps(self) -> int:
        """Number of batches for each rank."""
        return self.full + bool(self.tail)

    @property
    def rank_rows(self) -> int:
        """Number of rows in these batches, for each rank."""
        return self.full * self.batch_size + self.tail

    def places(self, step: int, rank: int) -> NDArray[np.int64]:
        """Places of a rank's batch, counted from the position in the epoch's order: int64 `(rows of the batch,)`."""
        size = self.batch_size if step < self.full else self.tail
        first = step * self.world_size * self.batch_size + rank * size
        return np.arange(first, first + size)


class ShardSteps(Dataset[Served]):
    """Map step numbers to batches, from a position to the end of its epoch.

    Args:
        position: step 0 is the batch that follows it.
        plan: sizes of the batches after `position`.
        order: order of the rows in the epoch.
        rows: rows of the split.
        gatherer: reads rows from the shards.
        rank: number of the rank that gets the batches, below `plan.world_size`.
    """

    def __init__(
        self,
        position: ShardPosition,
        *,
        plan: EpochPlan,
        order: Order,
        rows: RowSet,
        gatherer: Gatherer,
        rank: int,
    ) -> None:
        self._position, self._plan, self._order = position, plan, order
        self._rows, self._gatherer, self._rank = rows, gatherer, rank

    def __len__(self) -> int:
        return self._plan.steps

    def __getitem__(self, step: int) -> Served:
        """The batch of a step.

        Raises:
            IndexError: there is no such step.
            DamagedShardError: a shard is missing or damaged.
        """
        plan = self._plan
        if not 0 <= step < plan.steps:
            raise IndexError(f"step {step} is not between 0 and {plan.steps - 1}")
        places = self._position.start + plan.places(step, self._rank)
        near = self._order.shards(int(places[0]))
        self._gatherer.move_to([number for window in near for number in window])
        rows, provenance = self._gatherer.take(self._rows[self._order[places]])
        return Served(
            rows=rows,
            provenance=provenance,
            certain=plan.steps - step,
            certain_rows=plan.rank_rows - step * plan.batch_size,
            position=self._position,
            step=step + 1,
        )
