"""Prefetch the items of an iterator in one background thread, through a queue of limited size.

In: an iterator. Out: the same items, in the same order. The thread starts at the first `next`. An error in the thread
is raised by the `next` that would have returned the item, with the thread's traceback.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

TURN = 0.0005
"""Seconds after which a running Python thread lets another one run, while a thread prefetches. A thread may wait that
long at each torch operation, since operations release the interpreter; Python's own value is 0.005."""


class _ShortTurns:
    """A context, for several threads, in which Python's switch interval is at most `TURN`."""

    def __init__(self) -> None:
        self._guard, self._inside, self._before = threading.Lock(), 0, 0.0

    def __enter__(self) -> None:
        with self._guard:
            if not self._inside:
                self._before = sys.getswitchinterval()
                sys.setswitchinterval(min(self._before, TURN))
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._guard:
            self._inside -= 1
            if not self._inside:
                sys.setswitchinterval(self._before)


_short_turns = _ShortTurns()


class Prefetch(Generic[T]):
    """Iterate over `make()` in a background thread.

    Args:
        make: returns the iterator; called in the thread, where the iterator is also closed.
        depth: largest number of finished items in the queue; the thread computes one more item meanwhile.
        tensors: returns the tensors of an item that are on the device of `cuda`.
        cuda: the CUDA stream that the thread works on, from `cuda_stream`; the consumer's current stream waits until
            an item is finished. None if the items are not on CUDA.
    """

    def __init__(
        self,
        make: Callable[[], Iterator[T]],
        depth: int,
        tensors: Callable[[T], Iterable[Tensor]],
        cuda: torch.cuda.Stream | None = None,
    ) -> None:
        self._make, self._tensors, self._cuda = make, tensors, cuda
        self._queue: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="activation-producer", daemon=True)
        self._started = self._ended = False
        self._failure: BaseException | None = None

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._failure is not None:
            raise self._failure
        if self._ended:
            raise StopIteration
        if not self._started:
            self._started = True
            self._thread.start()
        item, error = self._queue.get()
        if error is not None:
            self._ended = True
            self._thread.join()
            if isinstance(error, StopIteration):
                raise StopIteration
            self._failure = error
            raise error
        made, event = item
        if self._cuda is not None:
            here = torch.cuda.current_stream(self._cuda.device)
            here.wait_event(event)
            for x in self._tensors(made):
                if x.is_cuda:
                    x.record_stream(here)  # its memory must not be reused before this stream has read it
        return made  # type: ignore[no-any-return]

    def close(self) -> None:
        """End the thread and wait for it; items left in the queue are dropped."""
        self._ended = True
        self._stop.set()
        while self._started and self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                continue
        if self._started:
            self._thread.join()
        while not self._queue.empty():
            self._queue.get_nowait()

    def _run(self) -> None:
        try:
            with _short_turns, ExitStack() as stack:
                if self._cuda is not None:
                    torch.cuda.set_device(self._cuda.device)
                    stack.enter_context(torch.cuda.stream(self._cuda))
                iterator = self._make()
                if isinstance(iterator, Generator):
                    stack.callback(iterator.close)
                for made in iterator:
                    self._put((made, self._cuda.record_event() if self._cuda is not None else None), None)
                    if self._stop.is_set():
                        return
            self._put(None, StopIteration())
        except BaseException as error:  # noqa: BLE001  raised again by `__next__`
            self._put(None, error)

    def _put(self, item: Any, error: BaseException | None) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put((item, error), timeout=0.1)
            except queue.Full:
                continue
        return None


def cuda_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A CUDA stream for a thread that prefetches to this device; None if it is not a CUDA device."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None
