"""The splits by the hash of documents, as compact sets of row numbers from which the k-th row can be looked up.

A split is a set of whole documents, so its rows are runs of consecutive row numbers. `RunSet` keeps the runs (24 bytes
each). `BitSet` keeps one bit per row, which is smaller if there are very many short runs. Neither keeps a list of rows.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

_BLOCK = 128  # bytes of the bitmap for each stored count
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
_POPCOUNT = _BITS.sum(axis=1).astype(np.int64)
_SELECT = np.stack([np.append(np.flatnonzero(row), np.zeros(8 - row.sum(), int)) for row in _BITS])
"""`_SELECT[byte, k]` is the position of the k-th set bit of a byte; position 0 is the highest bit."""


class RowSet(Protocol):
    """A set of row numbers in ascending order."""

    def __len__(self) -> int: ...

    def __getitem__(self, ordinals: Integers) -> Integers:
        """The k-th smallest row number for every k in `ordinals`, both int64 `(n,)`."""
        ...

    def count_below(self, rows: Integers) -> Integers:
        """Number of rows of the set below each of `rows`, both int64 `(n,)`."""
        ...


class RunSet:
    """A set of rows kept as runs of consecutive row numbers.

    Args:
        starts: first row of each run, int64 `(runs,)`, ascending.
        lengths: rows in each run, int64 `(runs,)`, positive.
    """

    def __init__(self, starts: Integers, lengths: Integers) -> None:
        self._ends = np.cumsum(lengths)  # in ordinals
        self._shift = starts - (self._ends - lengths)
        self._starts = starts

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, ordinals: Integers) -> Integers:
        run = 0 if len(self._ends) == 1 else np.searchsorted(self._ends, ordinals, "right")
        rows: Integers = ordinals + self._shift[run]
        return rows

    def count_below(self, rows: Integers) -> Integers:
        """Number of rows of the set below each of `rows`, both int64 `(n,)`."""
        if not len(self._ends):
            return np.zeros_like(rows)
        run = np.searchsorted(self._starts, rows, "right") - 1
        run_of = np.maximum(run, 0)
        inside = np.minimum(rows - self._shift[run_of], self._ends[run_of])
        return np.where(run < 0, 0, inside)


class BitSet:
    """A set of rows kept as a bitmap, with a count for each 1024 rows.

    Args:
        starts: first row of each run of consecutive rows, int64 `(runs,)`, ascending.
        lengths: rows in each run, int64 `(runs,)`, positive.
    """

    def __init__(self, starts: Integers, lengths: Integers) -> None:
        size = int(starts[-1] + lengths[-1]) if len(starts) else 0
        blocks = -(-size // (8 * _BLOCK))
        self._bytes = np.zeros(blocks * _BLOCK, np.uint8)
        piece = 2**20  # rows at a time, a multiple of 8
        for low in range(0, size, piece):
            first, last = (
                np.searchsorted(starts + lengths, low, "right"),
                np.searchsorted(starts, low + piece),
            )
            bits = np.zeros(piece + 1, np.int8)
            np.add.at(bits, np.clip(starts[first:last] - low, 0, piece), 1)
            np.add.at(bits, np.clip(starts[first:last] + lengths[first:last] - low, 0, piece), -1)
            packed = np.packbits(np.cumsum(bits[:piece], dtype=np.int8).astype(bool))
            self._bytes[low // 8 : low // 8 + piece // 8] = packed[: len(self._bytes) - low // 8]
        per_block = (
            _POPCOUNT[self._bytes].reshape(blocks, _BLOCK).sum(axis=1) if blocks else np.zeros(0, np.int64)
        )
        self._ends = np.cumsum(per_block)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, ordinals: Integers) -> Integers:
        block = np.searchsorted(self._ends, ordinals, "right")
        left = ordinals - np.where(block > 0, self._ends[block - 1], 0)
        content = self._bytes.reshape(-1, _BLOCK)[block]
        counts = np.cumsum(_POPCOUNT[content], axis=1)
        byte = (counts <= left[:, None]).sum(axis=1)
        each = np.arange(len(ordinals))
        left = left - np.where(byte > 0, counts[each, byte - 1], 0)
        rows: Integers = (block * _BLOCK + byte) * 8 + _SELECT[content[each, byte], left]
        return rows

    def count_below(self, rows: Integers) -> Integers:
        """Number of rows of the set below each of `rows`, both int64 `(n,)`."""
        result = np.zeros_like(rows)
        for place, row in enumerate(np.minimum(rows, 8 * len(self._bytes)).tolist()):
            block = row // (8 * _BLOCK)
            bits = np.unpackbits(self._bytes[block * _BLOCK : -(-row // 8)])
            before = self._ends[block - 1] if block else 0
            result[place] = before + bits[: row - block * 8 * _BLOCK].sum()
        return result


def row_set(starts: Integers, lengths: Integers) -> RowSet:
    """A `RunSet` or a `BitSet` of these runs, whichever is smaller; adjacent runs are joined.

    Args:
        starts: first row of each run, int64 `(runs,)`, ascending.
        lengths: rows in each run, int64 `(runs,)`.
    """
    keep = lengths > 0
    starts, lengths = starts[keep], lengths[keep]
    if len(starts):
        fresh = np.append(True, starts[1:] != starts[:-1] + lengths[:-1])
        lengths = np.add.reduceat(lengths, np.flatnonzero(fresh))
        starts = starts[fresh]
    size = int(starts[-1] + lengths[-1]) if len(starts) else 0
    return BitSet(starts, lengths) if len(starts) * 24 * 8 > size else RunSet(starts, lengths)


def heldout(hashes: NDArray[Any], val_fraction: float) -> NDArray[np.bool_]:
    """Which documents are held out: those whose text hash, as unsigned integer, is below `val_fraction * 2**64`.

    The rule depends on the text alone, so it is the same for every dataset, run and machine.

    Args:
        hashes: 64-bit hashes of the documents' texts, int64 `(n,)`.
        val_fraction: 0 to 1.

    Returns:
        bool `(n,)`.

    Raises:
        ValueError: `val_fraction` is not between 0 and 1.
    """
    if not 0 <= val_fraction <= 1:
        raise ValueError(f"val_fraction must lie between 0 and 1, got {val_fraction}")
    if val_fraction == 1:
        return np.ones(len(hashes), bool)
    result: NDArray[np.bool_] = hashes.astype(np.int64).view(np.uint64) < np.uint64(int(val_fraction * 2**64))
    return result


def in_split(
    hashes: NDArray[Any], val_fraction: float, test_fraction: float, split: str
) -> NDArray[np.bool_]:
    """Which documents belong to a split: `val` has the lowest hashes, `test` the highest ones, `train` the others.

    Args:
        hashes: 64-bit hashes of the documents' texts, int64 `(n,)`.
        val_fraction: share of the documents in `val`, 0 to 1.
        test_fraction: share of the documents in `test`, 0 to 1.
        split: `train`, `val`, `test` or `all`.

    Returns:
        bool `(n,)`.

    Raises:
        ValueError: a share is not between 0 and 1.
    """
    if split == "all":
        return np.ones(len(hashes), bool)
    val, test = heldout(hashes, val_fraction), heldout(~hashes, test_fraction)
    return {"val": val, "test": test & ~val, "train": ~(val | test)}[split]


def split_rows(
    hashes: Integers,
    lengths: Integers,
    val_fraction: float,
    split: str,
    max_rows: int | None = None,
    test_fraction: float = 0.0,
) -> RowSet:
    """The rows of a split.

    Args:
        hashes: text hash of the document of each run of rows, int64 `(runs,)`.
        lengths: rows in each run, `(runs,)`. A run begins where the run before it ends; the first begins at row 0.
        val_fraction: fraction of the documents in the split `val`.
        split: a split as of `in_split`.
        max_rows: keep at most this number of rows, from the documents with the lowest hashes. Which documents are kept
            does not depend on the order of the rows.
        test_fraction: fraction of the documents in the split `test`.

    Raises:
        ValueError: a fraction is not between 0 and 1.
    """
    lengths = lengths.astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    if split != "all":
        chosen = in_split(hashes, val_fraction, test_fraction, split)
        hashes, starts, lengths = hashes[chosen], starts[chosen], lengths[chosen]
    if max_rows is not None and lengths.sum() > max_rows:
        order = np.lexsort([starts, hashes.view(np.uint64)])
        total = np.cumsum(lengths[order])
        lengths = lengths.copy()
        lengths[order] = np.clip(max_rows - (total - lengths[order]), 0, lengths[order])
    return row_set(starts, lengths)
