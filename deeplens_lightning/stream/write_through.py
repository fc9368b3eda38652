"""Write a cache while training live in the first epoch; read it in later epochs and later runs.

In: a live stream and a folder. Out: in the first epoch the batches of the live stream, bit for bit; afterwards batches
from the cache. The cache has this rank's validation rows first, then the training rows in the order in which the model
computes them. Rows are numbered, so that a resumed run never writes a row twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from deeplens_lightning.distributed import on_every_rank
from deeplens_lightning.options import CacheOptions
from deeplens_lightning.shards.format import Manifest
from deeplens_lightning.shards.shard_stream import ShardStream
from deeplens_lightning.shards.writer import ShardWriter
from deeplens_lightning.stream.live_stream import LiveStream
from deeplens_lightning.stream.validation_set import HeldOutRows
from deeplens_lightning.types import Placement, RankProgress, Served, ShardPosition, StreamPosition

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class WriteThroughStream:
    """A stream that computes rows and writes a cache, and reads the cache once complete. Implements `types.Stream`.

    Attributes:
        live: this rank's live stream.
        placement: the ranks that write the cache.
        folder: path or fsspec URL of the cache.
        manifest: description of the cache.
        heldout: returns this rank's validation rows.
        val_fraction: share of documents held out, for reading the cache.
        options: how the cache is read.
    """

    live: LiveStream
    placement: Placement
    folder: str
    manifest: Manifest
    heldout: Callable[[], HeldOutRows]
    val_fraction: float
    options: CacheOptions
    _writer: ShardWriter | None = field(init=False, default=None)
    _shards: ShardStream | None = field(init=False, default=None)
    _heldout_rows: int = field(init=False, default=0)
    _failed: bool = field(init=False, default=False)

    @property
    def buffer_rows(self) -> int:
        """Number of slots of the live stream's buffer."""
        return self.live.buffer_rows

    @property
    def counts(self) -> dict[str, int]:
        """Numbers of documents, tokens and rows read or dropped by the live stream, by name."""
        return self.live.counts

    def start(self, epoch: int) -> StreamPosition:
        """The position of the first batch of an epoch: in the cache if all ranks have completed it, else in the text.

        A collective operation: all ranks must call it at the same time.
        """
        if epoch > 0:
            on_every_rank(self._write_the_rest, self.placement)
            self._close_writer()  # the last rank to finish completed the cache, perhaps after this one
        if all(on_every_rank(lambda: self._open().complete, self.placement)):
            return self._read().start(epoch)
        return self.live.start(epoch)

    def batches(self, position: StreamPosition, skip: int) -> Iterator[Served]:
        """Iterate over live batches and write their rows, or over batches of the cache, depending on the position."""
        if isinstance(position, ShardPosition):
            return self._read().batches(position, skip)
        writer = self._open()
        if not (writer.complete or writer.finished):
            self.live.writer = self
        return self.live.batches(position, skip)

    def checked(self, position: StreamPosition, step: int, *, anyway: bool = False) -> StreamPosition:
        """Check that a position lies in the text or in the cache, as the stream that it belongs to does."""
        stream = self._read() if isinstance(position, ShardPosition) else self.live
        return stream.checked(position, step, anyway=anyway)

    def rescaled(self, table: Sequence[RankProgress]) -> tuple[StreamPosition, int]:
        """Find where to continue with other ranks or batch sizes, which is possible only if the cache is complete.

        Args:
            table: the progress of every rank that was training before.

        Returns:
            A position, the same for every present rank, and the number of rows that will be served a second time.

        Raises:
            ValueError: the cache is not complete.
        """
        if not isinstance(table[0].position, ShardPosition):
            if len(table) == self.placement.ranks:
                raise ValueError(
                    f"{self.folder} is being written, and until it is complete batch_size cannot change to "
                    f"{self.live.batch_size}: continue with the batch_size that it was begun with, or without "
                    "write_shards (--data.write_shards null); run a BatchSizeFinder without write_shards, and give the "
                    "size that it finds"
                )
            raise ValueError(
                f"{self.folder} is being written by {len(table)} rank(s), and each rank writes its own shards: continue "
                f"with {len(table)} rank(s), or without write_shards (--data.write_shards null)"
            )
        return self._read().rescaled(table)

    def dropped(self, position: StreamPosition, epoch_batches: int) -> int:
        """Number of rows of this epoch that this rank has after its first `epoch_batches` batches; writes these rows."""
        if isinstance(position, ShardPosition):
            return self._read().dropped(position, epoch_batches)
        self._write_the_rest()  # first: counting reads the text to its end
        return self.live.dropped(position, epoch_batches)

    def row_age(self, position: StreamPosition, step: int) -> float | None:
        """Mean number of rows served between computing a row and serving it; None if rows are read from the cache."""
        return None if isinstance(position, ShardPosition) else self.live.row_age(position, step)

    def sync(self) -> None:
        """Flush all computed rows to disk; called before a checkpoint that counts them as served is saved.

        Does nothing after a row could not be written: that error was raised, and the rows are not in the cache.
        """
        if self._writer is not None and not (self._writer.complete or self._writer.finished or self._failed):
            with self._noting_failure():
                self._writer.sync()

    def close(self) -> None:
        """Close the cache and free the buffer."""
        self.live.writer = None
        self.live.close()
        self._close_writer()
        if self._shards is not None:
            self._shards.close()
        self._shards = None

    # ---- the `RowWriter` protocol, called by the live stream

    def write(self, rows: Mapping[str, Tensor], provenance: Tensor, number: int) -> None:
        """Append the rows of one model batch to the cache.

        Args:
            rows: `(n, d_in)` by hook point.
            provenance: int64 `(n, 4)`, columns as in `types.PROVENANCE`.
            number: number of the first of these rows in the epoch.
        """
        first_row = self._heldout_rows + number
        with self._noting_failure():
            self._open().append(rows, provenance, source={"row": number}, first_row=first_row)

    def end(self) -> None:
        """Mark this rank's part of the cache as finished."""
        writer = self._open()
        if not writer.finished:
            with self._noting_failure():
                writer.finish()

    @contextmanager
    def _noting_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._failed = True
            raise

    def _open(self) -> ShardWriter:
        if self._writer is None:
            self._writer = ShardWriter(
                self.folder, self.manifest, rank=self.live.rank, timeout=self.options.timeout
            )
            heldout = self.heldout()
            self._heldout_rows = len(heldout)
            if self._writer.finished and not self._writer.complete:
                self._writer.finish()  # completes the cache if this rank was the last one and was killed before that
            if self._writer.complete:
                logger.info("%s is complete: rows are read from it and the model does not run", self.folder)
            elif not self._writer.finished and len(heldout):
                self._writer.append(
                    heldout.rows, heldout.provenance, source={"validation": True}, first_row=0
                )
        return self._writer

    def _write_the_rest(self) -> None:
        """Write the rows that this rank did not serve because another rank had no more rows."""
        if self._writer is not None and not (self._writer.complete or self._writer.finished):
            self.live.drain()

    def _close_writer(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None

    def _read(self) -> ShardStream:
        if self._shards is None:
            documents = self.live.text.documents
            self._shards = ShardStream(
                self.folder,
                batch_size=self.live.batch_size,
                seed=self.live.seed,
                rank=documents.rank,
                world_size=documents.ranks,
                split="train",
                val_fraction=self.val_fraction,
                shuffle=self.options.shuffle,
                checksums=self.options.checksums,
                cache_dir=self.options.dir,
                cache_bytes=self.options.bytes,
                timeout=self.options.timeout,
                pin_memory=self.placement.batch_device.type == "cuda",
            )
        return self._shards
