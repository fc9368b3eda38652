"""Shuffle a stream of rows in one preallocated buffer, without copies and without waiting for a refill.

In: rows that arrive in order. Out: batches of shuffled rows. The buffer has N slots; N is a multiple of the batch size m.
Window w is a run of consecutive rows, and a random order of its slots is drawn from the seed (entropy, w). Batches are
served in that order. Serving a batch frees m slots, and the next rows, which belong to window w + 1, are written into
them. At the end of the order every row of window w was served exactly once, and window w + 1 is complete in the buffer.
Windows grow from a few batches to N rows, so that the first batch does not have to wait for a full buffer.

A position is the number of a window and the place of its first row in the stream. If the same rows arrive again from
there, the same batches are served again, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deeplens_lightning.devices import gather_rows

P = TypeVar("P")
P_co = TypeVar("P_co", covariant=True)
Slots = NDArray[np.int64]


class Arrivals(Protocol[P_co]):
    """The protocol of a source of rows, which writes its next rows into the buffers when called."""

    def position(self) -> P_co:
        """The position of the next row; a source that starts there writes the same rows again."""

    def fill(self, slots: Tensor) -> int:
        """Write the next `len(slots)` rows into these slots of the buffers, in order.

        Args:
            slots: int64 `(n,)`, on the CPU.

        Returns:
            The number of rows written: fewer than `n` only if the source has no more rows.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixed(Generic[P]):
    """One batch of shuffled rows, and its place in the stream."""

    tensors: tuple[Tensor, ...]
    """The rows of the batch, one tensor `(m, ...)` for each buffer; the last batch of the stream may be shorter."""
    certain: int
    """Number of batches that are guaranteed to be served, this one included."""
    certain_rows: int
    """Number of rows in those batches; only the last batch of the stream may be short."""
    window: int
    """Number of the window."""
    start: P
    """Position of the first row of the window."""
    step: int
    """Number of batches of the window served before this one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RotatingShuffle:
    """Shuffle rows in fixed buffers, window by window.

    Attributes:
        batch_size: m, rows per batch.
        capacity: N, number of slots of every buffer; a multiple of m.
        first_window: number of rows of window 0; a multiple of m, at most N.
        entropy: seed; with the number of a window it gives the order of that window.

    Raises:
        ValueError: the sizes are not multiples of `batch_size`, or not in ascending order.
    """

    batch_size: int
    capacity: int
    first_window: int
    entropy: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.capacity % self.batch_size or self.first_window % self.batch_size:
            raise ValueError(
                f"capacity={self.capacity} and first_window={self.first_window} must be multiples of "
                f"batch_size={self.batch_size}"
            )
        if not self.batch_size <= self.first_window <= self.capacity:
            raise ValueError(
                f"batch_size={self.batch_size} <= first_window={self.first_window} <= capacity={self.capacity} must hold"
            )

    def window_size(self, window: int) -> int:
        """Number of rows of a window: `first_window`, doubled for each later window up to `capacity`."""
        return min(self.capacity, self.first_window << min(window, 40))

    def serve(
        self,
        buffers: Sequence[Tensor],
        arrivals: Arrivals[P],
        *,
        window: int = 0,
        skip: int = 0,
        progress: Callable[[int], object] | None = None,
    ) -> Iterator[Mixed[P]]:
        """Iterate over shuffled batches until the source has no more rows; each row is served exactly once.

        Args:
            buffers: tensors `(capacity, ...)` that `arrivals` writes into.
            arrivals: the source of rows, beginning with the first row of `window`.
            window: number of the window to begin with.
            skip: number of batches to leave out at the start; their rows are written to the buffers but not gathered.
            progress: called with a number of rows whenever rows have arrived, until the first batch is served.
        """
        step = 0
        order = self._arrival_slots(window)
        start = arrivals.position()
        count = arrivals.fill(torch.from_numpy(order))
        _report(progress, count)
        ended = count < len(order)
        left: Slots = order[:count]
        while not ended:
            size, next_size = self.window_size(window), self.window_size(window + 1)
            order = self._order(window)
            slots, needs = _next_slots(order, size, next_size)
            next_start = arrivals.position()
            arrived = 0
            for step in range(size // self.batch_size):
                served = (step + 1) * self.batch_size
                if skip > 0:
                    skip -= 1
                else:
                    progress = None
                    index = order[served - self.batch_size : served]
                    yield self._mixed(buffers, index, size - served + self.batch_size, window, start, step)
                due = int(np.searchsorted(needs, served, side="right"))
                count = arrivals.fill(torch.from_numpy(slots[arrived:due]))
                arrived, ended = arrived + count, arrived + count < due
                _report(progress, count)
                if ended:
                    left = np.concatenate([order[served:], slots[:arrived]])
                    step += 1
                    break
            else:
                window, start, step = window + 1, next_start, 0
        left = left[self._generator(window, 1).permutation(len(left))]
        batches = range(0, len(left), self.batch_size)
        for number, first in enumerate(batches):
            if skip > 0:
                skip -= 1
                continue
            index = left[first : first + self.batch_size]
            yield self._mixed(buffers, index, len(left) - first, window, start, step + number)

    def rows_to_replay(self, window: int, skip: int) -> int:
        """Number of rows that must arrive before batch `skip` of `window` can be served: at most two windows."""
        size = self.window_size(window)
        return size + min(skip * self.batch_size, size) * self.window_size(window + 1) // size

    def _mixed(
        self,
        buffers: Sequence[Tensor],
        index: Slots,
        certain_rows: int,
        window: int,
        start: P,
        step: int,
    ) -> Mixed[P]:
        slots = torch.from_numpy(index)
        tensors = tuple(gather_rows(buffer, slots) for buffer in buffers)
        return Mixed(
            tensors=tensors,
            certain=-(-certain_rows // self.batch_size),
            certain_rows=certain_rows,
            window=window,
            start=start,
            step=step,
        )

    def _generator(self, window: int, ending: int = 0) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence((*self.entropy, window, ending))))

    def _order(self, window: int) -> Slots:
        """The order in which a window's slots are served, int64 `(window_size,)`."""
        return self._generator(window).permutation(self.window_size(window))

    def _arrival_slots(self, window: int) -> Slots:
        """The slot of each of a window's rows, in the order of their arrival."""
        if window == 0:
            return np.arange(self.window_size(0))
        size, next_size = self.window_size(window - 1), self.window_size(window)
        return _next_slots(self._order(window - 1), size, next_size)[0]


def _next_slots(order: Slots, size: int, next_size: int) -> tuple[Slots, Slots]:
    """For each row of the next window, its slot, and the number of rows of this window served before it arrives.

    Arriving rows go into freed slots, in the order in which these were served. The `next_size - size` slots by which
    the window grows are filled evenly in between.

    Args:
        order: order in which this window's slots are served, int64 `(size,)`.
        size: number of rows of this window.
        next_size: number of rows of the next window.
    """
    j = np.arange(next_size)
    grown = next_size - size
    before, after = j * grown // next_size, (j + 1) * grown // next_size
    freed = j - before
    is_new = after > before
    slots = np.where(is_new, size + before, order[freed.clip(max=size - 1)])
    return slots, np.where(is_new, freed, freed + 1)


def _report(progress: Callable[[int], object] | None, rows: int) -> None:
    if progress is not None:
        progress(rows)
