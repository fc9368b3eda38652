"""The order in which rows are served in an epoch: global shuffle, shuffle in windows, or no shuffle.

In: places in an epoch's order (0 is the row served first). Out: ordinals, that is, numbers of rows within the split.
No order depends on how the rows are divided into shards: windows are made of stretches of consecutive rows, whose length
is part of a position. A stretch overlaps one or several shards.

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
    """Stretches of consecutive rows in random order, grouped into windows; the rows of a window are permuted together.

    Args:
        counts: rows of the split in each stretch, int64 `(stretches,)`.
        sizes: size of each stretch in bytes, int64 `(stretches,)`.
        window_bytes: largest size of a window's stretches together; a window has at least one stretch. None: no
            shuffle, each stretch is a window.
        seed: seed of the run.
        epoch: number of the epoch.
        firsts: number of rows of the split before each shard, and in all shards, int64 `(shards + 1,)`.

    Attributes:
        windows: number of the window of each stretch that has rows of the split, in the order in which they are read.
    """

    def __init__(
        self,
        counts: Integers,
        sizes: Integers,
        window_bytes: int | None,
        seed: int,
        epoch: int,
        firsts: Integers,
    ) -> None:
        number = np.arange(len(counts))
        self._shuffled = window_bytes is not None
        stretches = (
            Permutation(len(counts), np.random.SeedSequence([seed, epoch]))[number]
            if self._shuffled
            else number
        )
        stretches = stretches[counts[stretches] > 0]
        self.windows = _group(sizes[stretches], window_bytes or 0)
        self._ends = np.cumsum(counts[stretches])
        self._begins = (np.cumsum(counts) - counts)[stretches]
        self._shift = self._begins - (self._ends - counts[stretches])
        last = np.append(np.flatnonzero(np.diff(self.windows)), len(stretches) - 1)
        self._window_ends = self._ends[last]
        self._seed, self._firsts = (seed, epoch), firsts
        self._last: tuple[int, Permutation] | None = None
        self._near: tuple[int, list[list[int]]] = -1, []

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
        """Numbers of the shards that the window of `place` overlaps, and the same for the next window."""
        window = int(np.searchsorted(self._window_ends, place, "right"))
        if self._near[0] != window:
            self._near = window, [self._overlapping(self.windows == window + ahead) for ahead in (0, 1)]
        return self._near[1]

    def _overlapping(self, chosen: NDArray[np.bool_]) -> list[int]:
        """Numbers of the shards that have rows of the split in the chosen stretches."""
        begins = self._begins[chosen]
        ends = self._ends[chosen] + self._shift[chosen]
        inside = np.zeros(len(self._firsts), np.int64)
        np.add.at(inside, np.searchsorted(self._firsts, begins, "right") - 1, 1)
        np.add.at(inside, np.searchsorted(self._firsts, ends, "left"), -1)
        found: list[int] = np.flatnonzero((np.cumsum(inside)[:-1] > 0) & (np.diff(self._firsts) > 0)).tolist()
        return found


def _group(sizes: NDArray[Any], limit: int) -> Integers:
    """Put consecutive sizes into groups with a sum of at most `limit` and at least one member: each one's group."""
    groups, group, total = [], 0, 0
    for place, size in enumerate(sizes.tolist()):
        if place and total + size > limit:
            group, total = group + 1, 0
        total += size
        groups.append(group)
    return np.array(groups, np.int64)
