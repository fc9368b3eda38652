"""The rotating shuffle: mix a stream of rows in one preallocated buffer, without pauses or copies.

Pure: tensors in, tensors out. The buffer has N slots, N a multiple of the batch size m. Window w is a run of
consecutive rows; the order in which its slots are served is drawn from (entropy, w). Serving a batch frees m
slots, and the next rows, of window w + 1, move into them. When the order is used up, every row of window w was
served exactly once and window w + 1 is already in place. Windows grow from a few batches to N, so that the
first batch does not wait for a full buffer.

A position is the number of a window and where its first row came from: the same rows arriving again from there
give the same batches again, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

P = TypeVar("P")
P_co = TypeVar("P_co", covariant=True)
Slots = NDArray[np.int64]


class Arrivals(Protocol[P_co]):
    """Rows in their order, written into the buffers on request."""

    def position(self) -> P_co:
        """The place of the next row, from which the same rows can be made to arrive again."""

    def fill(self, slots: Tensor) -> int:
        """Write the next `len(slots)` rows into these slots of the buffers, in order.

        Args:
            slots: int64 `(n,)`, on the CPU.

        Returns:
            The number of rows written: fewer than `n` only when no more will ever come.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixed(Generic[P]):
    """One served batch."""

    tensors: tuple[Tensor, ...]
    """The batch's rows of every buffer, `(m, ...)` each; the last batch of all may be shorter."""
    certain: int
    """Batches that are sure to be served from here on, this one included."""
    certain_rows: int
    """Rows in those batches: only the very last batch may be short."""
    window: int
    start: P
    """Position of the first row of `window`."""
    step: int
    """Batches served since `start`, this one not included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RotatingShuffle:
    """Constants of a shuffle, and the generator of its batches.

    Attributes:
        batch_size: m, rows a batch.
        capacity: N, slots of every buffer; a multiple of m.
        first_window: rows of window 0; a multiple of m, at most N.
        entropy: seed of the order of every window, together with the window's number.
    """

    batch_size: int
    capacity: int
    first_window: int
    entropy: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.capacity % self.batch_size or self.first_window % self.batch_size:
            raise ValueError("capacity and first_window must be multiples of batch_size")
        if not self.batch_size <= self.first_window <= self.capacity:
            raise ValueError("batch_size <= first_window <= capacity must hold")

    def window_size(self, window: int) -> int:
        """Rows of a window: doubling from `first_window` until the buffer is full."""
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
        """Serve batches, each row exactly once, until no more rows come.

        Args:
            buffers: tensors `(capacity, ...)`, what `arrivals` writes into.
            arrivals: the rows, beginning with the first one of `window`.
            window: number of the window to begin with.
            skip: batches of it (and beyond) to leave out: their rows arrive, but are not gathered.
            progress: called with a number of rows as they arrive, until the first wanted batch.
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
        """Rows that arrive before the batch `skip` of `window` can be served: at most two windows."""
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
        tensors = tuple(buffer.index_select(0, slots.to(buffer.device)) for buffer in buffers)
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
    """Slots for the rows of the next window while this one is served, and the rows served before each arrives.

    Arrivals take the freed slots in the order of serving, and, spread evenly among them, the
    `next_size - size` slots by which the window grows.
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
