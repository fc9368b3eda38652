"""The batches of one epoch of a cache by step number: a map-style dataset.

In: a step number. Out: a `Served` with rows gathered from the shards.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset

from deeplens_lightning.shards.gather import Gatherer, Located
from deeplens_lightning.shards.order import Order
from deeplens_lightning.types import Served, ShardPosition

AHEAD = 2**15
"""Number of rows to find at a time, before they are gathered. It is cheaper while the CPU's caches hold the numbers."""


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

    @classmethod
    def of(cls, rows: int, batch_size: int, world_size: int, drop_last: bool = False) -> EpochPlan:
        """Divide the `rows` after a position among the ranks; `drop_last` leaves out the smaller last batch."""
        full, left = divmod(rows, batch_size * world_size)
        tail = 0 if drop_last else left // world_size
        return cls(rows=rows, full=full, tail=tail, batch_size=batch_size, world_size=world_size)

    @property
    def steps(self) -> int:
        """Number of batches for each rank."""
        return self.full + bool(self.tail)

    @property
    def rank_rows(self) -> int:
        """Number of rows in these batches, for each rank."""
        return self.full * self.batch_size + self.tail

    def size(self, step: int) -> int:
        """Number of rows of each rank's batch."""
        return self.batch_size if step < self.full else self.tail

    def first(self, step: int, rank: int) -> int:
        """Place of the first row of a rank's batch, counted from the position in the epoch's order."""
        return step * self.world_size * self.batch_size + rank * self.size(step)


class ShardSteps(Dataset[Served]):
    """Map step numbers to batches, from a position to the end of its epoch.

    Args:
        position: step 0 is the batch that follows it.
        plan: sizes of the batches after `position`.
        order: order of the rows in the epoch.
        gatherer: reads rows of the split from the shards.
        rank: number of the rank that gets the batches, below `plan.world_size`.
    """

    def __init__(
        self,
        position: ShardPosition,
        *,
        plan: EpochPlan,
        order: Order,
        gatherer: Gatherer,
        rank: int,
    ) -> None:
        self._position, self._plan, self._order = position, plan, order
        self._gatherer, self._rank = gatherer, rank
        self._located: dict[int, Located] = {}

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
        if step not in self._located:
            self._locate(step)
        near = self._order.shards(self._position.start + plan.first(step, self._rank))
        self._gatherer.move_to([number for window in near for number in window])
        rows, origins = self._gatherer.take(self._located[step])
        return Served(
            rows=rows,
            origins=origins,
            certain=plan.steps - step,
            certain_rows=plan.rank_rows - step * plan.batch_size,
            position=self._position,
            step=step + 1,
        )

    def _locate(self, step: int) -> None:
        """Find the rows of this step and of the next ones, about `AHEAD` rows."""
        plan = self._plan
        after = max(step + 1, min(plan.full, step + AHEAD // plan.batch_size))
        firsts = np.array([plan.first(number, self._rank) for number in range(step, after)])
        places = self._position.start + firsts[:, None] + np.arange(plan.size(step))
        batches = self._order[places.ravel()].reshape(places.shape)
        self._located = {step + n: self._gatherer.locate(batch) for n, batch in enumerate(batches)}
