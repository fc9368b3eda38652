"""A seeded pseudo-random permutation of `range(n)` in constant memory.

In: `n` and a NumPy `SeedSequence`. Out: an object that is indexed with one position or an array of positions. No array
of size `n` is allocated: 10**12 positions take no more memory than 10.

The construction is a Feistel network on a grid: position `x` is written as `(left, right)` with `left < a`,
`right < b` and `a * b` at or just above `n`. Every round adds a keyed hash of one half to the other half, modulo the
size of that half. A round can be inverted, so it is a permutation (Black & Rogaway, "Ciphers with arbitrary finite
domains", 2002). A result from `n` to `a * b - 1` goes through the network again until it is below `n`. All arithmetic
is in uint64, so the order is the same on every machine and NumPy version.
"""

from __future__ import annotations

from math import isqrt
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

MAX_LENGTH = 2**40
"""Largest `n`."""

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
        values = self._encrypt(positions.reshape(-1).astype(np.uint64))
        while (outside := np.flatnonzero(values >= np.uint64(self._n))).size:
            values[outside] = self._encrypt(values[outside])
        if isinstance(index, int):
            return int(values[0])
        return values.astype(np.int64).reshape(positions.shape)

    def _encrypt(self, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """One pass through the network: a permutation of `range(a * b)`."""
        width = self._sizes[1]
        left = x // width
        halves = (left, x - left * width)
        for number, key in enumerate(self._keys):
            target, source, size = halves[number % 2], halves[1 - number % 2], self._sizes[number % 2]
            mixed = source + key
            mixed *= _MIX
            mixed ^= mixed >> _HALF
            mixed *= _REMIX
            mixed >>= _HALF
            mixed *= size  # below 2**32 times at most 2**20: the high half of the product is below `size`
            mixed >>= _HALF
            target += mixed
            target -= size * (target >= size)
        return halves[0] * width + halves[1]
