"""In which order rows are served in an epoch: three formulas, none of which lists the rows.

In: places in an epoch's order. Out: ordinals among the rows of the split. Any place can be asked for
at any time, which is what makes resuming cost nothing.
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
        """The ordinals at these places."""
        ...

    def shards(self, place: int) -> list[list[int]]:
        """Shards needed around a place: now, and next; empty when any may be needed at any time."""
        ...


class GlobalOrder:
    """One permutation of everything."""

    def __init__(self, rows: int, seed: int, epoch: int) -> None:
        self._permutation = Permutation(rows, np.random.SeedSequence([seed, epoch]))

    def __getitem__(self, places: Integers) -> Integers:
        return self._permutation[places]

    def shards(self, place: int) -> list[list[int]]:  # noqa: ARG002
        """Any shard at any time."""
        return []


class WindowOrder:
    """Shards in a random order, taken together in windows; rows permuted within each window.

    Args:
        counts: rows of the split in each shard, int64 `(shards,)`.
        sizes: bytes of each shard, int64 `(shards,)`.
        window_bytes: a window holds shards up to this size, and at least one. None: shards in their
            own order, one a window, rows unshuffled.
        seed: of the run.
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

    def __getitem__(self, places: Integers) -> Integers:
        if self._shuffled:
            places = places.copy()
            window = np.searchsorted(self._window_ends, places, "right")
            for number in np.unique(window).tolist():
                inside = window == number
                start = int(self._window_ends[number - 1]) if number else 0
                rows = int(self._window_ends[number]) - start
                order = Permutation(rows, np.random.SeedSequence([*self._seed, number]))
                places[inside] = start + order[places[inside] - start]
        ordinals: Integers = places + self._shift[np.searchsorted(self._ends, places, "right")]
        return ordinals

    def shards(self, place: int) -> list[list[int]]:
        """The shards of the window of a place, and of the next one."""
        window = int(np.searchsorted(self._window_ends, place, "right"))
        return [self._shards[self._windows == window + ahead].tolist() for ahead in (0, 1)]


def _group(sizes: NDArray[Any], limit: int) -> Integers:
    """Consecutive things into groups of at most `limit` in all and at least one: the group of each."""
    groups, group, total = [], 0, 0
    for place, size in enumerate(sizes.tolist()):
        if place and total + size > limit:
            group, total = group + 1, 0
        total += size
        groups.append(group)
    return np.array(groups, np.int64)
