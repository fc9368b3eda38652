"""The order in which rows are served in an epoch: global shuffle, shuffle in windows of shards, or no shuffle.

In: places in an epoch's order (0 is the row served first). Out: ordinals, that is, numbers of rows within the split.
Each order is a formula and no list of rows is kept, so the order can be computed from any place without computing the
places before it. Resuming relies on this.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deeplens_lightning.permutation import Permutation

Integers = NDArray[np.int64]


class Order(Protocol):
    """The order of one epoch."""

    def __getitem__(self, places: Integers) -> Integers:
        """Ordinals at `places`, both int64 `(n,)`."""
        ...

    def shards(self, place: int) -> list[list[int]]:
        """Numbers of the shards read at `place`, and of those read next; empty if any shard may be read at any time."""
        ...


class GlobalOrder:
    """One permutation of all rows.

    Args:
        rows: number of rows in the split.
        seed: seed of the run.
        epoch: number of the epoch.
    """

    def __init__(self, rows: int, seed: int, epoch: int) -> None:
        self._permutation = Permutation(rows, np.random.SeedSequence([seed, epoch]))

    def __getitem__(self, places: Integers) -> Integers:
        return self._permutation[places]

    def shards(self, place: int) -> list[list[int]]:  # noqa: ARG002
        """An empty list: any shard may be read at any time."""
        return []


class WindowOrder:
    """Shards in random order, grouped into windows; the rows of each window are permuted together.

    Args:
        counts: rows of the split in each shard, int64 `(shards,)`.
        sizes: size of each shard in bytes, int64 `(shards,)`.
        window_bytes: largest size of a window's shards together; a window has at least one shard. None: no shuffle,
            each shard is a window.
        seed: seed of the run.
        epoch: number of the epoch.
    """

    def __init__(
        self, counts: Integers, sizes: Integers, window_bytes: int | None, seed: int, epoch: int
    ) -> None:
        number = np.arange(len(counts))
        self._shuffled = window_bytes is not None
        shards = (
            Permutation(len(counts), np.random.SeedSequence([seed, epoch]))[number]
            if self._shuffled
            else number
        )
        shards = shards[counts[shards] > 0]
        self._windows = _group(sizes[shards], window_bytes or 0)
        self._shards = shards
        self._ends = np.cumsum(counts[shards])
        self._shift = (np.cumsum(counts) - counts)[shards] - (self._ends - counts[shards])
        last = np.append(np.flatnonzero(np.diff(self._windows)), len(shards) - 1)
        self._window_ends = self._ends[last]
        self._seed = (seed, epoch)
        self._last: tuple[int, Permutation] | None = None

    def __getitem__(self, places: Integers) -> Integers:
        if self._shuffled:
            places = places.copy()
            window = np.searchsorted(self._window_ends, places, "right")
            for number in np.unique(window).tolist():
                inside = window == number
                start = int(self._window_ends[number - 1]) if number else 0
                rows = int(self._window_ends[number]) - start
                if self._last is None or self._last[0] != number:
                    self._last = number, Permutation(rows, np.random.SeedSequence([*self._seed, number]))
                places[inside] = start + self._last[1][places[inside] - start]
        ordinals: Integers = places + self._shift[np.searchsorted(self._ends, places, "right")]
        return ordinals

    def shards(self, place: int) -> list[list[int]]:
        """Numbers of the shards in the window of `place`, and in the next window."""
        window = int(np.searchsorted(self._window_ends, place, "right"))
        return [self._shards[self._windows == window + ahead].tolist() for ahead in (0, 1)]


def _group(sizes: NDArray[Any], limit: int) -> Integers:
    """Put consecutive sizes into groups with a sum of at most `limit` and at least one member: each one's group."""
    groups, group, total = [], 0, 0
    for place, size in enumerate(sizes.tolist()):
        if place and total + size > limit:
            group, total = group + 1, 0
        total += size
        groups.append(group)
    return np.array(groups, np.int64)
