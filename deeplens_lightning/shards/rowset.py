"""Sets of row numbers that can be indexed by rank, kept small; and the held-out split made of them.

A split is a set of whole documents, so a set of rows is a few runs of consecutive rows. `RunSet` keeps
those (16 bytes a run); where documents are scattered so finely that a bit per row is less, `BitSet`
does. Neither ever lists the rows.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

_BLOCK = 128  # bytes of bitmap between two counts
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
_POPCOUNT = _BITS.sum(axis=1).astype(np.int64)
_SELECT = np.stack([np.append(np.flatnonzero(row), np.zeros(8 - row.sum(), int)) for row in _BITS])
"""`_SELECT[byte, k]` is the place of the k-th set bit, the highest bit being place 0."""


class RowSet(Protocol):
    """An ascending set of row numbers."""

    def __len__(self) -> int: ...

    def __getitem__(self, ordinals: Integers) -> Integers:
        """The k-th smallest row, for every k in `ordinals`."""
        ...

    def count_below(self, rows: Integers) -> Integers:
        """How many of the set's rows lie below each of `rows`."""
        ...


class RunSet:
    """Runs of consecutive rows: `starts` ascending, `lengths` positive, both int64 `(runs,)`."""

    def __init__(self, starts: Integers, lengths: Integers) -> None:
        self._ends = np.cumsum(lengths)  # in ordinals
        self._shift = starts - (self._ends - lengths)
        self._starts = starts

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, ordinals: Integers) -> Integers:
        rows: Integers = ordinals + self._shift[np.searchsorted(self._ends, ordinals, "right")]
        return rows

    def count_below(self, rows: Integers) -> Integers:
        """How many of the set's rows lie below each of `rows`."""
        if not len(self._ends):
            return np.zeros_like(rows)
        run = np.searchsorted(self._starts, rows, "right") - 1
        run_of = np.maximum(run, 0)
        inside = np.minimum(rows - self._shift[run_of], self._ends[run_of])
        return np.where(run < 0, 0, inside)


class BitSet:
    """The same with a bit per row and a count per 1024 rows."""

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
        """How many of the set's rows lie below each of `rows`."""
        result = np.zeros_like(rows)
        for place, row in enumerate(np.minimum(rows, 8 * len(self._bytes)).tolist()):
            block = row // (8 * _BLOCK)
            bits = np.unpackbits(self._bytes[block * _BLOCK : -(-row // 8)])
            before = self._ends[block - 1] if block else 0
            result[place] = before + bits[: row - block * 8 * _BLOCK].sum()
        return result


def row_set(starts: Integers, lengths: Integers) -> RowSet:
    """The smaller of the two kinds for these runs (ascending; neighbours are joined)."""
    keep = lengths > 0
    starts, lengths = starts[keep], lengths[keep]
    if len(starts):
        fresh = np.append(True, starts[1:] != starts[:-1] + lengths[:-1])
        lengths = np.add.reduceat(lengths, np.flatnonzero(fresh))
        starts = starts[fresh]
    size = int(starts[-1] + lengths[-1]) if len(starts) else 0
    return BitSet(starts, lengths) if len(starts) * 24 * 8 > size else RunSet(starts, lengths)


def heldout(hashes: NDArray[Any], val_fraction: float) -> NDArray[np.bool_]:
    """Which documents are held out: those whose 64-bit text hash, unsigned, is below the fraction of 2**64.

    The rule depends on the text alone, so it is the same for every source, run and machine.

    Args:
        hashes: int64 `(n,)`.
        val_fraction: 0 to 1.

    Returns:
        bool `(n,)`.
    """
    if not 0 <= val_fraction <= 1:
        raise ValueError(f"val_fraction must lie between 0 and 1, got {val_fraction}")
    if val_fraction == 1:
        return np.ones(len(hashes), bool)
    result: NDArray[np.bool_] = hashes.astype(np.int64).view(np.uint64) < np.uint64(int(val_fraction * 2**64))
    return result


def split_rows(
    hashes: Integers, lengths: Integers, val_fraction: float, split: str, max_rows: int | None = None
) -> RowSet:
    """The rows of a split, of a source made of runs of documents.

    Args:
        hashes: int64 `(runs,)`, the document of each run.
        lengths: `(runs,)`, rows in each; runs follow one another.
        val_fraction: see `heldout`.
        split: `train`, `val` or `all`.
        max_rows: keep only the documents with the lowest hashes, up to so many rows: the same ones
            wherever their rows lie.
    """
    lengths = lengths.astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    if split != "all":
        chosen = heldout(hashes, val_fraction) == (split == "val")
        hashes, starts, lengths = hashes[chosen], starts[chosen], lengths[chosen]
    if max_rows is not None and lengths.sum() > max_rows:
        order = np.lexsort([starts, hashes.view(np.uint64)])
        total = np.cumsum(lengths[order])
        lengths = lengths.copy()
        lengths[order] = np.clip(max_rows - (total - lengths[order]), 0, lengths[order])
    return row_set(starts, lengths)
