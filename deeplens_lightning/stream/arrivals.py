"""Fill the buffers of the two shuffles of a live stream: one with blocks of text, one with rows from the model.

In: packed chunks, and model batches. Out: tensors written into the slots that a shuffle has freed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from deeplens_lightning.devices import move_rows
from deeplens_lightning.model.rows import ModelBatch
from deeplens_lightning.stream.computed_batches import ComputedBatch
from deeplens_lightning.stream.prefetch import Prefetch
from deeplens_lightning.text.packing import Chunk
from deeplens_lightning.types import PROVENANCE, BlockPosition, RowPosition


class RowWriter(Protocol):
    """The protocol of an object that receives the rows of every model batch, in the order in which they are computed."""

    def write(self, rows: Mapping[str, Tensor], provenance: Tensor, number: int) -> None:
        """Receive the rows of one model batch.

        Args:
            rows: `(n, d_in)` by hook point, on the model's device.
            provenance: int64 `(n, 4)`, columns as in `types.PROVENANCE`.
            number: number of the first of these rows in the epoch.
        """
        ...

    def end(self) -> None:
        """Called once when the epoch has no more rows."""
        ...


class BlockArrivals:
    """Write the blocks of an epoch into the pool, the buffer of the block shuffle.

    Args:
        chunks: chunks of the epoch, beginning at `start`.
        start: position of the first window of the pool.

    Attributes:
        pool: the tensors that `fill` writes to, in the order of the fields of `Blocks`.
        documents: number of documents that begin in the chunks read so far.
        empty: number of documents without a token read so far.
    """

    def __init__(self, chunks: Iterator[Chunk], start: BlockPosition) -> None:
        self.pool: Sequence[Tensor] = ()
        self.documents = self.empty = 0
        self._chunks = chunks
        self._start = start.start
        self._kept = start.kept
        self._taken = 0
        self._chunk: Chunk | None = None
        self._next()

    def position(self) -> BlockPosition:
        """The position of the next chunk. A window of the pool always begins with a chunk."""
        return BlockPosition(start=self._start if self._chunk is None else self._chunk.start, kept=self._kept)

    def fill(self, slots: Tensor) -> int:
        """Write the next blocks into these slots of the pool, int64 `(n,)`; returns the number of blocks written."""
        filled = 0
        while filled < len(slots) and self._chunk is not None:
            blocks = self._chunk.blocks
            count = min(len(slots) - filled, len(blocks) - self._taken)
            for pool, tensor in zip(self.pool, blocks.tensors(), strict=True):
                pool[slots[filled : filled + count]] = tensor[self._taken : self._taken + count]
            filled, self._taken = filled + count, self._taken + count
            if self._taken == len(blocks):
                self._kept += int(blocks.keep.sum())
                self._next()
        return filled

    def count_all(self) -> int:
        """Count the rows of the whole epoch; reads the text to the end of the epoch."""
        while self._chunk is not None:
            self._kept += int(self._chunk.blocks.keep.sum())
            self._next()
        return self._kept

    def _next(self) -> None:
        self._chunk, self._taken = next(self._chunks, None), 0
        if self._chunk is not None:
            self.documents += self._chunk.documents
            self.empty += self._chunk.empty


class RowArrivals:
    """Write the rows of model batches into the buffer of the row shuffle.

    Args:
        blocks: the source of blocks, for its counts.
        computed: the model batches, beginning at `start`: with its model batch if `enter`, else with its group.
        buffers: the tensors that `fill` writes to: one `(slots + 1, d_in)` for each hook point, whose last row is
            for `move_rows`, and provenance `(slots, 4)` last.
        writer: receives the rows of every model batch; None for no writer.
        start: position of the first window of the buffer.
        enter: take the model batch of `start` in the constructor, because the window begins inside that batch.

    Attributes:
        tokens: number of tokens that the model has read.
        outliers: number of rows of the epoch dropped for their norm.
    """

    def __init__(
        self,
        *,
        blocks: BlockArrivals,
        computed: Iterator[ComputedBatch],
        buffers: Sequence[Tensor],
        writer: RowWriter | None,
        start: RowPosition,
        enter: bool,
    ) -> None:
        self.blocks = blocks
        self.tokens = 0
        self.outliers = start.outliers
        self._computed, self._buffers, self._writer = computed, buffers, writer
        self._outliers_here = 0
        self._failure: BaseException | None = None
        self._made = start.made
        self._group = start.blocks
        self._since = start.blocks.since
        self._batch = -1
        self._row = 0
        self._out = ModelBatch(
            activations={},
            kept=torch.empty(0, dtype=torch.int64),
            provenance=torch.empty(0, len(PROVENANCE), dtype=torch.int64),
        )
        if enter:
            self._enter(start)

    def _enter(self, start: RowPosition) -> None:
        """Take the model batch of a position.

        Raises:
            ValueError: it has no such row.
        """
        if not self._advance() and not start.row:
            return
        if start.row > len(self._out.kept):
            raise ValueError(
                f"the model batch where the checkpoint was taken has {len(self._out.kept)} rows and no row {start.row}: "
                "take another checkpoint, or the dataset and model that it was made with"
            )
        self._row, self._since = start.row, start.blocks.since

    def position(self) -> RowPosition:
        """The position of the next row."""
        if self._batch < 0:
            self._advance()
        return RowPosition(
            blocks=replace(self._group, since=self._since),
            batch=max(self._batch, 0),
            row=self._row,
            outliers=self.outliers - self._outliers_here,
            made=self._made - len(self._out.kept),
        )

    def fill(self, slots: Tensor) -> int:
        """Write the next rows into these slots of the buffers, int64 `(n,)`; returns the number of rows written."""
        filled = 0
        while filled < len(slots):
            kept = self._out.kept
            if self._row == len(kept):
                if not self._advance():
                    break
                continue
            count = min(len(slots) - filled, len(kept) - self._row)
            into, rows = slots[filled : filled + count], slice(self._row, self._row + count)
            for buffer, x in zip(self._buffers, self._out.activations.values(), strict=False):
                move_rows(x, kept[rows], buffer, into)
            self._buffers[-1].index_copy_(0, into, self._out.provenance[rows])
            filled, self._row, self._since = filled + count, self._row + count, self._since + count
        return filled

    def count_all(self) -> int:
        """Count the rows of the whole epoch, including any outliers in the text that the model has not read yet.

        Reads the text to the end of the epoch: no model batch can be taken afterwards.
        """
        self.close()
        return self.blocks.count_all() - self.outliers

    def drain(self) -> None:
        """Take the model batches of the rest of the epoch, so that `writer` receives all rows."""
        while self._advance():
            pass

    def close(self) -> None:
        """End the thread that computes ahead, if there is one."""
        if isinstance(self._computed, Prefetch):
            self._computed.close()

    def _advance(self) -> bool:
        """Take the next model batch, if there is one. After an error, every later call raises it again."""
        if self._failure is not None:
            raise self._failure
        try:
            return self._take_next()
        except BaseException as error:
            self._failure = error  # an iterator that has raised only says that it is at its end
            raise

    def _take_next(self) -> bool:
        batch = next(self._computed, None)
        if batch is None:
            if self._writer is not None:
                self._writer.end()
            return False
        if batch.group.window != self._group.window:
            self._since = 0
        self._group, self._batch, self._row = batch.group, batch.number, 0
        self._out, self._outliers_here = batch.out, batch.outliers
        self.tokens += batch.tokens
        self.outliers += batch.outliers
        if self._writer is not None:
            self._writer.write(self._out.rows(), self._out.provenance, self._made)
        self._made += len(self._out.kept)
        return True
