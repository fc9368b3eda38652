"""The training data loader: serves the batches of a stream, epoch after epoch, and tracks the position in the data.

In: a `types.Stream`. Out: for each step a Tensor `(batch, d_in)`, or a dict of them. This module handles what a Trainer
does with loaders: it makes iterators that it never uses, fetches a batch ahead, drops it and iterates again, and saves
checkpoints at any step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deeplens_lightning.devices import on_device
from deeplens_lightning.distributed import on_every_rank
from deeplens_lightning.normalization import Scaling
from deeplens_lightning.stream.checkpoint import LoaderPosition
from deeplens_lightning.stream.prefetch import Prefetch, cuda_stream
from deeplens_lightning.types import (
    Batch,
    Origins,
    Placement,
    RankProgress,
    Served,
    Stream,
    StreamPosition,
    key_of,
)


class Item(NamedTuple):
    """A batch, and a function that returns its provenance, int64 `(batch, 4)`, columns as in `types.PROVENANCE`."""

    batch: Batch
    origins: Origins


@dataclass(frozen=True, slots=True, kw_only=True)
class Certain:
    """The number of batches that one rank is able to serve from its position on."""

    batches: int
    progress: RankProgress


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """The state at one agreement of the ranks on a number of batches that every rank is able to serve.

    Attributes:
        at: number of batches that this loader had served.
        epoch_batches: number of batches of the data epoch that were served.
        rows_dropped: number of rows that earlier epochs could not serve, the sum over all ranks.
        table: the progress of every rank; `rows` is the number of rows in its guaranteed batches.
    """

    at: int
    epoch_batches: int
    rows_dropped: int
    table: tuple[RankProgress, ...]


class ActivationLoader:
    """Serve the batches of a stream to a Trainer; each iteration continues after the last batch that was trained on.

    A new data epoch begins only if the current one has no batch left and the iteration needs one. The epoch number of
    the Trainer has no influence.

    Args:
        stream: the stream of this rank.
        scalings: normalisation by hook point, applied to every batch.
        dtype: dtype of batches; None keeps the dtype of the activations.
        batch_size: rows per batch of this rank.
        batches_per_epoch: end each iteration after this number of batches; None to end it with the data epoch.
        known_length: number of batches of a data epoch; None if not known before reading it.
        prefetch: number of batches computed ahead in a thread; 0 for no thread.
        placement: the ranks, and the device of the batches.
        unprocessed: returns the number of served batches that were not trained on, counted from the last one.
        seen: called with every batch and a function that returns its provenance, int64 `(batch, 4)`.
        warn: called with each message for the user, which it shows on one rank.
        endless: returns whether the Trainer itself ends an iteration after a number of batches, so that the loader
            must never end it.
        overfit: begin every iteration with the same batches, for `Trainer(overfit_batches=...)`.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        scalings: Mapping[str, Scaling],
        dtype: torch.dtype | None,
        batch_size: int,
        batches_per_epoch: int | None,
        known_length: int | None,
        prefetch: int,
        placement: Placement,
        unprocessed: Callable[[], int],
        seen: Callable[[Batch, Origins], None],
        warn: Callable[[str], None],
        endless: Callable[[], bool] = lambda: False,
        overfit: bool = False,
    ) -> None:
        self.stream, self.dtype, self.prefetch = stream, dtype, prefetch
        self._placement = placement
        self._cuda = cuda_stream(placement.batch_device) if prefetch else None
        self.batch_size = batch_size
        self.scalings = scalings
        self.batches_per_epoch, self.known_length = batches_per_epoch, known_length
        self._unprocessed, self._seen, self._warn, self._overfit = unprocessed, seen, warn, overfit
        self._endless = endless
        self._live: Iterator[Served] | Prefetch[Served] | None = None
        self._head: Served | None = None
        self._granted = 0
        self._ended = False
        self._grants: deque[Grant] = deque()
        self._recent: deque[Item] = deque()
        self._again: deque[Item] = deque()
        self.served = 0
        self.rows_served = 0
        self.rows_dropped = 0
        self.in_epoch = 0
        self.epoch_batches = 0
        self.wait_seconds = 0.0
        self._position: StreamPosition = stream.start(0)
        self._skip = 0

    def __len__(self) -> int:
        length = self.batches_per_epoch or self.known_length
        if length is None:
            raise TypeError("the number of batches in an epoch is not known: give max_tokens, which sets it")
        return length

    def __iter__(self) -> Iterator[Batch]:
        return self._iterate()  # a generator: nothing happens before its first next

    def _iterate(self) -> Iterator[Batch]:
        if self._overfit:
            self._stop()
            self._granted, self._position, self._skip, self._ended = 0, self.stream.start(0), 0, False
        else:
            self._take_back(self._unprocessed())
        limit = self.batches_per_epoch
        if limit is None or self.in_epoch >= limit:
            self.in_epoch = 0
        served = False
        while limit is None or self.in_epoch < limit or self._endless():
            item = self._next()
            if item is None:
                if served and limit is None and not self._endless():
                    self.in_epoch = 0
                    return
                self._begin_epoch()
                if (item := self._next()) is None:
                    raise ValueError(
                        "no rows to train on: every document is empty, held out, or consists of excluded tokens, or "
                        "there are fewer documents than ranks; check dataset_name, val_fraction and drop_first_n"
                    )
            served = True
            self.in_epoch += 1
            yield item

    def origins(self) -> Origins | None:
        """Provenance of the batch for the next step, the first one that was served and not trained on."""
        waiting = self._unprocessed()
        return self._recent[-waiting].origins if 0 < waiting <= len(self._recent) else None

    def state_dict(self) -> dict[str, Any]:
        """Empty: the data module saves the state, but Lightning warns about loaders without this method."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: the data module restores the state."""

    def position(self) -> LoaderPosition | None:
        """The position after the last batch that was trained on; None before the first batch.

        It is the same on every rank, and no communication is needed to compute it.
        """
        completed = self.served - self._unprocessed()
        grant = next((grant for grant in reversed(self._grants) if grant.at <= completed), None)
        if grant is None:
            return None
        since = completed - grant.at
        return LoaderPosition(
            ranks=grant.table,
            since=since,
            batch_size=self.batch_size,
            epoch_batches=grant.epoch_batches + since,
            in_epoch=max(0, self.in_epoch - (self.served - completed)),
            rows_dropped=grant.rows_dropped,
        )

    def go_to(self, position: StreamPosition, skip: int, counters: LoaderPosition) -> None:
        """Continue at a position in the stream, with the counters of an earlier loader.

        Args:
            position: a position in the stream.
            skip: number of batches to leave out from there.
            counters: numbers of batches and dropped rows to continue counting from.
        """
        self.close()
        self._grants.clear()
        self._position, self._skip, self._ended = position, skip, False
        self.in_epoch, self.epoch_batches = counters.in_epoch, counters.epoch_batches
        self.rows_dropped = counters.rows_dropped

    def row_age(self) -> float | None:
        """Mean number of rows served between computing a row and serving it, in the last batch; None with shards."""
        return self.stream.row_age(self._position, self._skip)

    def close(self) -> None:
        """End the thread and free the batches; the next iteration continues from the position."""
        self._stop()
        self._granted = 0
        self._recent.clear()
        self._again.clear()

    def _next(self) -> Batch | None:
        if self._again:
            item = self._again.popleft()
        else:
            begun = time.perf_counter()
            if self._granted == 0 and not self._ended:
                self._granted = self._agree()
                self._ended = self._granted == 0
            served = self._take() if self._granted else None
            self.wait_seconds += time.perf_counter() - begun
            if served is None:
                return None
            self._granted -= 1
            self.epoch_batches += 1
            item = self._finished(served)
            self.rows_served += len(key_of(item.batch))
        for _ in range(len(self._recent) - self._unprocessed()):
            self._recent.popleft()
        self.served += 1
        self._recent.append(item)
        self._seen(*item)
        return item.batch

    def _agree(self) -> int:
        """Agree with all ranks on the number of next batches that every rank is able to serve. A collective."""
        everyone = on_every_rank(self._certain, self._placement)
        granted = min(rank.batches for rank in everyone)
        if granted:
            table = tuple(rank.progress for rank in everyone)
            self._grants.append(
                Grant(
                    at=self.served,
                    epoch_batches=self.epoch_batches,
                    rows_dropped=self.rows_dropped,
                    table=table,
                )
            )
            completed = self.served - self._unprocessed()
            while len(self._grants) > 1 and self._grants[1].at <= completed:
                self._grants.popleft()
        elif any(rank.batches for rank in everyone):
            self._end_unevenly()
        return granted

    def _certain(self) -> Certain:
        head = self._peek()
        here = RankProgress(position=self._position, step=self._skip, rows=0)
        if head is not None:
            here = RankProgress(position=head.position, step=head.step - 1, rows=head.certain_rows)
        return Certain(batches=head.certain if head is not None else 0, progress=here)

    def _end_unevenly(self) -> None:
        """End the epoch because another rank has no rows left, and count the rows that cannot be served."""
        position = self._head.position if self._head else self._position
        self._stop()
        dropped = sum(
            on_every_rank(lambda: max(0, self.stream.dropped(position, self.epoch_batches)), self._placement)
        )
        self.rows_dropped += dropped
        self._warn(f"a rank has no more rows: {dropped} rows of this epoch are dropped")

    def _begin_epoch(self) -> None:
        self._stop()
        self._position, self._skip = self.stream.start(self._position.epoch + 1), 0
        self.epoch_batches, self._ended = 0, False

    def _peek(self) -> Served | None:
        """The next batch of the stream. After an error, the next call begins again after the last batch served."""
        if self._live is None:
            position, skip = self._position, self._skip
            if self.prefetch:
                self._live = Prefetch(
                    lambda: self.stream.batches(position, skip),
                    self.prefetch,
                    lambda served: served.rows.values(),
                    self._cuda,
                )
            else:
                self._live = self.stream.batches(position, skip)
        if self._head is None:
            try:
                self._head = next(self._live, None)
            except BaseException:
                self._stop()  # an iterator that has raised only says that it is at its end
                raise
        return self._head

    def _take(self) -> Served | None:
        served, self._head = self._peek(), None
        if served is not None:
            self._position, self._skip = served.position, served.step
        return served

    def _stop(self) -> None:
        if isinstance(self._live, Prefetch | Generator):
            self._live.close()
        self._live, self._head = None, None

    def _take_back(self, count: int) -> None:
        """Put back the last `count` batches, which the Trainer fetched and dropped, to serve them again."""
        for _ in range(count):
            with suppress(IndexError):
                self._again.appendleft(self._recent.pop())
                self.served -= 1
                self.in_epoch = max(0, self.in_epoch - 1)

    def _finished(self, served: Served) -> Item:
        device = self._placement.batch_device
        rows = {
            name: on_device(x, device) for name, x in served.rows.items()
        }  # cached rows may widen in the cast
        return Item(finish(rows, self.scalings, self.dtype), served.origins)


def finish(rows: Mapping[str, Tensor], scalings: Mapping[str, Scaling], dtype: torch.dtype | None) -> Batch:
    """Cast and normalise the rows of a batch; returns a Tensor for one hook point and a dict for several.

    Args:
        rows: `(batch, d_in)` by hook point.
        scalings: normalisation by hook point.
        dtype: dtype of the result; None keeps the dtype of `rows`.
    """
    cast = {name: x.to(dtype) if dtype is not None else x for name, x in rows.items()}
    done = {name: x if scalings[name].is_identity else scalings[name].apply(x) for name, x in cast.items()}
    return done if len(done) > 1 else next(iter(done.values()))
