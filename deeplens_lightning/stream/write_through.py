"""Write-through: the first epoch trains live and writes a cache, later epochs and later runs read it.

In: a live stream and a folder. Out: the same batches, bit for bit, while the model runs; afterwards batches of
shards. Rows are written in the order in which the model makes them, behind this rank's validation rows, and
numbered, so that a run that was stopped never writes one twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from deeplens_lightning.distributed import gather
from deeplens_lightning.shards.format import Manifest
from deeplens_lightning.shards.shard_stream import ShardStream
from deeplens_lightning.shards.writer import ShardWriter
from deeplens_lightning.stream.live_stream import ActivationStream
from deeplens_lightning.types import Served

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class WriteThroughStream:
    """A stream that is live until its cache is complete. See `served.Stream`.

    Attributes:
        live: this rank's live stream.
        folder: of the cache, a path or an fsspec URL.
        manifest: what is written.
        heldout: makes this rank's validation rows and their provenance.
        val_fraction: share of documents held out, when the cache is read.
    """

    live: ActivationStream
    folder: str
    manifest: Manifest
    heldout: Callable[[], tuple[dict[str, Tensor], Tensor]]
    val_fraction: float
    _writer: ShardWriter | None = field(init=False, default=None)
    _shards: ShardStream | None = field(init=False, default=None)
    _heldout_rows: int = field(init=False, default=0)

    @property
    def buffer_rows(self) -> int:
        """Slots of the live stream's buffer."""
        return self.live.buffer_rows

    @property
    def counts(self) -> dict[str, int]:
        """Of the live stream."""
        return self.live.counts

    def start(self, epoch: int) -> dict[str, Any]:
        """Where an epoch begins: in the text, until every rank has written all its rows."""
        if epoch > 0 and self._writer is not None and not self._writer.complete:
            self._write_the_rest()
        if all(gather(self._open().complete)):
            return self._read().start(epoch)
        return self.live.start(epoch)

    def batches(self, position: dict[str, Any] | None, skip: int) -> Iterator[Served]:
        """Live batches, written as they come, or batches of the cache, as the position says."""
        if position is not None and _in_shards(position):
            return self._read().batches(position, skip)
        writer = self._open()
        if not (writer.complete or writer.finished):
            self.live.on_rows = self._write
        return self.live.batches(position, skip)

    def rescaled(self, table: Sequence[tuple[dict[str, Any], int, int]]) -> tuple[dict[str, Any], int]:
        """Go on with another number of ranks, which only the finished cache can.

        Raises:
            ValueError: the cache is being written.
        """
        if not _in_shards(table[0][0]):
            raise ValueError(
                f"{self.folder} is being written by {len(table)} rank(s), each its own shards: go on with as many, or "
                "without write_shards"
            )
        return self._read().rescaled(table)

    def dropped(self, position: dict[str, Any], epoch_batches: int) -> int:
        """See `served.Stream`."""
        if _in_shards(position):
            return self._read().dropped(position, epoch_batches)
        return self.live.dropped(position, epoch_batches)

    def sync(self) -> None:
        """Make every row that the model made durable: a checkpoint is about to say that they were served."""
        if self._writer is not None and not (self._writer.complete or self._writer.finished):
            self._writer.sync()

    def close(self) -> None:
        """Let go of the folder and the buffer."""
        self.live.on_rows = None
        self.live.close()
        if self._writer is not None:
            self._writer.close()
        if self._shards is not None:
            self._shards.close()
        self._writer = self._shards = None

    def _open(self) -> ShardWriter:
        if self._writer is None:
            self._writer = ShardWriter(self.folder, self.manifest, rank=self.live.documents.rank)
            rows, provenance = self.heldout()
            self._heldout_rows = len(provenance)
            if self._writer.complete:
                logger.info("%s is complete: rows are read, the model does not run", self.folder)
            elif not self._writer.finished and len(provenance):
                self._writer.append(rows, provenance, source={"validation": True}, first_row=0)
        return self._writer

    def _write(self, rows: Mapping[str, Tensor] | None, provenance: Tensor, number: int) -> None:
        """Take one model batch of the live stream; None when there are no more."""
        writer = self._open()
        if rows is None:
            if not writer.finished:
                writer.finish()
        else:
            writer.append(rows, provenance, source={"row": number}, first_row=self._heldout_rows + number)

    def _write_the_rest(self) -> None:
        """Run what this rank could not serve because another one ended first."""
        self.live.drain()
        gather(None)  # the last rank to finish completes the cache
        if self._writer is not None:
            self._writer.close()
        self._writer = None

    def _read(self) -> ShardStream:
        if self._shards is None:
            documents = self.live.documents
            self._shards = ShardStream(
                self.folder,
                batch_size=self.live.batch_size,
                seed=self.live.seed,
                rank=documents.rank,
                world_size=documents.ranks,
                split="train",
                val_fraction=self.val_fraction,
            )
        return self._shards


def _in_shards(position: Mapping[str, Any]) -> bool:
    return "shuffle" in position
