"""A seeded pseudo-random permutation of `range(n)` in little memory.

In: `n` and a NumPy `SeedSequence`. Out: an object that is indexed with one position or an array of positions. No array
of size `n` is allocated: after many look-ups tables of about `24 * sqrt(n)` numbers, and none above `n = 2**30`.

The construction is a Feistel network on a grid: position `x` is written as `(left, right)` with `left < a`,
`right < b` and `a * b` at or just above `n`. Every round adds a keyed hash of one half to the other half, modulo the
size of that half. A round can be inverted, so it is a permutation (Black & Rogaway, "Ciphers with arbitrary finite
domains", 2002). A result from `n` to `a * b - 1` goes through the network again until it is below `n`. All hashes are
computed in uint64, so the order is the same on every machine and NumPy version.

What a round adds depends on one half only. Once as many positions as a half has values were looked up, the rounds are
kept in tables, one number for each value of a half, which makes looking up a batch four times as fast. Halves are then
reduced once after the last round, so each table repeats its numbers as often as the sum before it can exceed the half.
"""

from __future__ import annotations

from math import isqrt
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

MAX_LENGTH = 2**40
"""Largest `n`."""

_TABLED = 2**15
"""Largest size of a half whose rounds are kept in tables (at most 6 MB)."""

_ROUNDS = 8
_SMALL, _SMALL_ROUNDS = (
    1024,
    32,
)  # a round mixes little on a small grid; with more rounds all orders are equally likely
_MIX = np.uint64(0x9E3779B97F4A7C15)  # odd multipliers of splitmix64; this one is 2**64 / golden ratio
_REMIX = np.uint64(0xBF58476D1CE4E5B9)
_HALF = np.uint64(32)


class Permutation:
    """A pseudo-random permutation of `range(n)`.

    Args:
        n: number of positions, 1 to 2**40.
        seed: selects the permutation; equal seeds give equal permutations on every machine.

    Raises:
        ValueError: `n` is outside 1 to 2**40.

    Example:
        >>> order = Permutation(5, np.random.SeedSequence(0))
        >>> sorted(order[np.arange(5)].tolist())
        [0, 1, 2, 3, 4]
    """

    def __init__(self, n: int, seed: np.random.SeedSequence) -> None:
        if not 1 <= n <= MAX_LENGTH:
            raise ValueError(f"a permutation needs 1 to 2**40 positions, got {n}")
        self._n = n
        rows = isqrt(n - 1) + 1
        self._sizes = (np.uint64(rows), np.uint64(-(-n // rows)))
        self._keys = seed.generate_state(_ROUNDS if n > _SMALL else _SMALL_ROUNDS, np.uint64)
        self._looked_up = 0
        self._tables: list[NDArray[np.int64]] = []
        self._outside = np.zeros(0, np.int64)

    def __len__(self) -> int:
        return self._n

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: NDArray[Any]) -> NDArray[np.int64]: ...

    def __getitem__(self, index: int | NDArray[Any]) -> int | NDArray[np.int64]:
        """The value at a position, or at an integer array of positions (int64, of the same shape).

        Raises:
            IndexError: a position is negative or not below `n`.
        """
        positions = np.asarray(index)
        if positions.size and (positions.min() < 0 or positions.max() >= self._n):
            raise IndexError(f"positions run from 0 to {self._n - 1}, got {index!r}")
        self._looked_up += positions.size
        if not self._tables and self._n > _SMALL and self._sizes[0] <= min(self._looked_up, _TABLED):
            self._tabulate()
        flat = positions.reshape(-1)
        values = self._from_tables(flat.astype(np.int64)) if self._tables else self._computed(flat)
        return int(values[0]) if isinstance(index, int) else values.reshape(positions.shape)

    def _tabulate(self) -> None:
        """Compute the tables: what each round adds, and the final value of each result that is not below `n`."""
        rows, width = map(int, self._sizes)
        for number in range(len(self._keys)):
            source = np.arange(width if number % 2 == 0 else rows)
            added = self._added(number, source.astype(np.uint64)).astype(np.int64)
            self._tables.append(np.tile(added, (number + 1) // 2 + 1))
        outside = np.arange(self._n, rows * width)
        # No position leads into a cycle of results that are all outside, and such a cycle has no end.
        self._outside = self._computed(outside, passes=len(outside))

    def _from_tables(self, x: NDArray[np.int64]) -> NDArray[np.int64]:
        rows, width = map(int, self._sizes)
        left = x // width
        halves = (left, x - left * width)
        for number, table in enumerate(self._tables):
            target, source = halves[number % 2], halves[1 - number % 2]
            target += table.take(source)
        left, right = halves
        left -= left // rows * rows
        right -= right // width * width
        left *= width
        left += right
        outside = np.flatnonzero(left >= self._n)
        left[outside] = self._outside[left[outside] - self._n]
        return left

    def _computed(self, x: NDArray[Any], passes: int = MAX_LENGTH) -> NDArray[np.int64]:
        """The values of the positions `x`; results outside go through the network at most `passes` times more."""
        values = self._encrypt(x.astype(np.uint64))
        while passes and (outside := np.flatnonzero(values >= np.uint64(self._n))).size:
            values[outside] = self._encrypt(values[outside])
            passes -= 1
        return values.astype(np.int64)

    def _encrypt(self, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """One pass through the network: a permutation of `range(a * b)`."""
        width = self._sizes[1]
        left = x // width
        halves = (left, x - left * width)
        for number in range(len(self._keys)):
            target, size = halves[number % 2], self._sizes[number % 2]
            target += self._added(number, halves[1 - number % 2])
            target -= size * (target >= size)
        return halves[0] * width + halves[1]

    def _added(self, number: int, source: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """What a round adds to one half, as a keyed hash of the other half that is below the size of the first."""
        mixed: NDArray[np.uint64] = source + self._keys[number]
        mixed *= _MIX
        mixed ^= mixed >> _HALF
        mixed *= _REMIX
        mixed >>= _HALF
        mixed *= self._sizes[
            number % 2
        ]  # below 2**32 times at most 2**20: the high half of the product is below it
        mixed >>= _HALF
        return mixed
