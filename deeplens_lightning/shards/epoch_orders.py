"""Make the order of the rows of a cache in an epoch, which does not depend on how they are divided into shards.

In: a catalog, a split, and a position. Out: an `Order`. Windows are made of stretches of a fixed number of consecutive
rows, whatever shards these are stored in.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import numpy as np

from deeplens_lightning.shards.catalog import Catalog, Shard
from deeplens_lightning.shards.gather import shard_starts
from deeplens_lightning.shards.names import parse_shard_name
from deeplens_lightning.shards.order import GlobalOrder, Order, WindowOrder
from deeplens_lightning.shards.rowset import Integers, RowSet
from deeplens_lightning.types import ShardPosition

FEW = 16
"""Up to this number of shards, or of rows in a batch, version 1 of the order did not depend on the number of shards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochOrders:
    """The orders of all epochs of a split.

    Attributes:
        catalog: the shards.
        split: the rows of the split.
        seed: seed of the run.
    """

    catalog: Catalog
    split: RowSet
    seed: int

    def order(self, position: ShardPosition) -> Order:
        """The order of the epoch of a position."""
        if position.shuffle == "global":
            return GlobalOrder(len(self.split), self.seed, position.epoch)
        return self._windows(position, *stretches(self.catalog, _stretch_rows(position)))

    def same_in_version_1(self, position: ShardPosition) -> bool:
        """Whether version 1 of the order is provably the present one, in the epoch and for the batches of a position."""
        shards = self.catalog.shards
        if position.shuffle == "none":
            return True
        if len(shards) > FEW and position.batch_size > FEW:
            return False
        if position.shuffle == "global":
            return True
        starts, sizes = stretches(self.catalog, _stretch_rows(position))
        nbytes = np.array([shard.nbytes for shard in shards], np.int64)
        if not np.array_equal(starts, shard_starts(shards)):
            return False
        now, then = (self._windows(position, starts, each) for each in (sizes, nbytes))
        return np.array_equal(now.windows, then.windows)

    def _windows(self, position: ShardPosition, starts: Integers, sizes: Integers) -> WindowOrder:
        return WindowOrder(
            np.diff(self.split.count_below(starts)),
            sizes,
            position.window_bytes if position.shuffle == "window" else None,
            self.seed,
            position.epoch,
            self.split.count_below(shard_starts(self.catalog.shards)),
        )


def stretches(catalog: Catalog, rows: int) -> tuple[Integers, Integers]:
    """Divide the rows of each rank of a cache, and those of each bare tensor, into stretches.

    Args:
        catalog: the shards.
        rows: number of rows of a stretch; the last one of a rank or a tensor may be shorter.

    Returns:
        Number of each stretch's first row and the number of all rows, int64 `(stretches + 1,)`; and the size of each
        stretch in bytes, int64 `(stretches,)`. In a cache the size counts rows alone, so that it does not depend on the
        number of files.
    """
    starts, sizes, total = [], [], 0
    for _, group in groupby(catalog.shards, key=_written_together):
        shards = list(group)
        here = sum(shard.rows for shard in shards)
        begins = np.arange(0, here, rows)
        lengths = np.diff(np.append(begins, here))
        manifest = catalog.manifests.get(shards[0].folder.where)
        starts.append(total + begins)
        sizes.append(
            lengths * manifest.row_bytes
            if manifest is not None
            else lengths * sum(shard.nbytes for shard in shards) // max(here, 1)
        )
        total += here
    return np.append(np.concatenate(starts), total), np.concatenate(sizes)


def _written_together(shard: Shard) -> tuple[str, str | int]:
    """A name of the rows that were written one after another: those of one rank of a cache, or a bare tensor."""
    name = parse_shard_name(shard.file) if shard.storage != "bare" else None
    return shard.folder.where, shard.file if name is None else name[0]


def _stretch_rows(position: ShardPosition) -> int:
    assert position.stretch_rows is not None  # `ShardStream.checked` converts positions of version 1
    return position.stretch_rows
