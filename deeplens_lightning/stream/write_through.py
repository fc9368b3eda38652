"""Write-through: the first epoch trains live and writes a cache, later epochs and later runs read it.

In: a live stream and a folder. Out: the same batches, bit for bit, while the model runs; afterwards batches of
shards. Rows are written in the order in which the model makes them, behind this rank's validation rows, and
numbered, so that a run that was stopped never writes one twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from deeplens_lightning.distributed import gather
from deeplens_lightning.options import CacheOptions
from deeplens_lightning.shards.format import Manifest
from deeplens_lightning.shards.shard_stream import ShardStream
from deeplens_lightning.shards.writer import ShardWriter
from deeplens_lightning.stream.live_stream import LiveStream
from deeplens_lightning.stream.validation_set import HeldOutRows
from deeplens_lightning.types import RankProgress, Served, ShardPosition, StreamPosition

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class WriteThroughStream:
    """A stream that is live until its cache is complete. Implements `types.Stream`.

    Attributes:
        live: this rank's live stream.
        folder: of the cache, a path or an fsspec URL.
        manifest: what is written.
        heldout: computes this rank's validation rows.
        val_fraction: share of documents held out, when the cache is read.
        options: how the cache is read.
    """

    live: LiveStream
    folder: str
    manifest: Manifest
    heldout: Callable[[], HeldOutRows]
    val_fraction: float
    options: CacheOptions
    _writer: ShardWriter | None = field(init=False, default=None)
    _shards: ShardStream | None = field(init=False, default=None)
    _heldout_rows: int = field(init=False, default=0)

    @property
    def buffer_rows(self) -> int:
        """Slots of the live stream's buffer."""
        return self.live.buffer_rows

    @property
    def counts(self) -> dict[str, int]:
        """Counts of the live stream."""
        return self.live.counts

    def start(self, epoch: int) -> StreamPosition:
        """The position at which an epoch begins: in the text, until every rank has written all its rows."""
        if epoch > 0 and self._writer is not None and not self._writer.complete:
            self._write_the_rest()
        if all(gather(self._open().complete)):
            return self._read().start(epoch)
        return self.live.start(epoch)

    def batches(self, position: StreamPosition, skip: int) -> Iterator[Served]:
        """Live batches, written as they come, or batches of the cache, depending on the position."""
        if isinstance(position, ShardPosition):
            return self._read().batches(position, skip)
        writer = self._open()
        if not (writer.complete or writer.finished):
            self.live.writer = self
        return self.live.batches(position, skip)

    def rescaled(self, table: Sequence[RankProgress]) -> tuple[StreamPosition, int]:
        """Continue with another number of ranks, which is possible only once the cache is complete.

        Raises:
            ValueError: the cache is being written.
        """
        if not isinstance(table[0].position, ShardPosition):
            raise ValueError(
                f"{self.folder} is being written by {len(table)} rank(s), each its own shards: continue with the same "
                "number of ranks, or without write_shards"
            )
        return self._read().rescaled(table)

    def dropped(self, position: StreamPosition, epoch_batches: int) -> int:
        """Rows of this epoch that this rank has beyond its first `epoch_batches` batches."""
        if isinstance(position, ShardPosition):
            return self._read().dropped(position, epoch_batches)
        return self.live.dropped(position, epoch_batches)

    def row_age(self, position: StreamPosition, step: int) -> float | None:
        """That of the live stream; None once rows are read from the cache."""
        return None if isinstance(position, ShardPosition) else self.live.row_age(position, step)

    def sync(self) -> None:
        """Make every row that the model made durable: a checkpoint is about to say that they were served."""
        if self._writer is not None and not (self._writer.complete or self._writer.finished):
            self._writer.sync()

    def close(self) -> None:
        """Close the cache and free the buffer."""
        self.live.writer = None
        self.live.close()
        if self._writer is not None:
            self._writer.close()
        if self._shards is not None:
            self._shards.close()
        self._writer = self._shards = None

    # ---- `RowWriter`, for the live stream

    def write(self, rows: Mapping[str, Tensor], provenance: Tensor, number: int) -> None:
        """Append one model batch of the live stream to the cache."""
        first_row = self._heldout_rows + number
        self._open().append(rows, provenance, source={"row": number}, first_row=first_row)

    def end(self) -> None:
        """Mark this rank's part of the cache as finished."""
        writer = self._open()
        if not writer.finished:
            writer.finish()

    def _open(self) -> ShardWriter:
        if self._writer is None:
            self._writer = ShardWriter(self.folder, self.manifest, rank=self.live.rank)
            heldout = self.heldout()
            self._heldout_rows = len(heldout)
            if self._writer.complete:
                logger.info("%s is complete: rows are read, the model does not run", self.folder)
            elif not self._writer.finished and len(heldout):
                self._writer.append(
                    heldout.rows, heldout.provenance, source={"validation": True}, first_row=0
                )
        return self._writer

    def _write_the_rest(self) -> None:
        """Run and write the text that this rank could not serve because another rank ended first."""
        self.live.drain()
        gather(None)  # the last rank to finish completes the cache
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
            )
        return self._shards
