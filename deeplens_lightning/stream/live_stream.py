"""Compute batches of activations live: the text stage, a shuffle of blocks, the frozen model, a shuffle of rows.

    documents -> chunks of blocks -> shuffled blocks -> model batches -> rows -> shuffled rows -> batches

Each stage pulls from the one before it: the row shuffle runs the model, which takes blocks from the block shuffle, which
reads the text. Positions are nested in the same way: a window of the row shuffle starts at a row of a model batch. The
model batch is in a window of the block shuffle, and this window starts at a document.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from tqdm.auto import tqdm

from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.stream.arrivals import BlockArrivals, RowArrivals, RowWriter
from deeplens_lightning.stream.automatic_sizes import row_bytes
from deeplens_lightning.stream.computed_batches import ComputedBatch, computed_batches
from deeplens_lightning.stream.prefetch import Prefetch, cuda_stream
from deeplens_lightning.stream.rotating_shuffle import Mixed, RotatingShuffle
from deeplens_lightning.text.packing import Blocks
from deeplens_lightning.text.pipeline import TextStage
from deeplens_lightning.types import (
    PROVENANCE,
    BlockPosition,
    LivePosition,
    RankProgress,
    RowPosition,
    Served,
    StreamPosition,
    TextPosition,
)

GROUPED = 32
"""Number of model batches in a group. The blocks of a group are sorted so that blocks which run fast together share one
batch."""
POOL_BLOCKS, POOL_TOKENS = 4096, 2**19
FIRST_WINDOW = 4
"""Number of batches in the first window, which is computed before the first batch is served."""


@dataclass(kw_only=True)
class LiveStream:
    """Compute one rank's batches of activations while they are served. Implements `types.Stream`.

    Attributes:
        model: the frozen model.
        text: the text of this rank; a chunk of its packing is `GROUPED` model batches.
        batch_size: rows per batch.
        buffer_rows: number of slots of the buffer, a multiple of `batch_size`.
        buffer_device: device of the buffer and of the batches.
        inference_batch_size: blocks per model batch.
        seed: seed of both shuffles.
        pool: whether blocks are shuffled before the model runs on them.
        max_norms: by hook point, the largest norm of a row; rows above it are dropped.
        ahead: number of model batches computed ahead in a thread; 0 for no thread.
        show_progress: whether to show a bar while rows are computed again after resuming.
        writer: receives the rows of every model batch, for a cache; None for no writer.
    """

    model: FrozenModel
    text: TextStage
    batch_size: int
    buffer_rows: int
    buffer_device: torch.device
    inference_batch_size: int
    seed: int
    pool: bool = True
    max_norms: Mapping[str, float] = field(default_factory=dict)
    ahead: int = 0
    show_progress: bool = True
    writer: RowWriter | None = None
    _buffers: list[Tensor] = field(init=False, default_factory=list)
    _rows: RowArrivals | None = field(init=False, default=None)
    _cuda: torch.cuda.Stream | None = field(init=False, default=None)

    @property
    def rank(self) -> int:
        """Number of this rank."""
        return self.text.documents.rank

    @property
    def buffer_bytes(self) -> int:
        """Size of the shuffle buffer in bytes."""
        return self.buffer_rows * row_bytes(self.model)

    def batches(self, position: StreamPosition, skip: int) -> Iterator[Served]:
        """Iterate over the batches from `position` to the end of the epoch, without the first `skip` ones.

        Raises:
            ValueError: the position is one in a cache.
        """
        at = live(position)
        self._close_rows()
        self._rows = self._arrivals(at)
        shuffle = self._row_shuffle(at.epoch)
        replayed = shuffle.rows_to_replay(at.window, skip) if at.window or skip else 0
        with self._bar(replayed) as bar:
            for mixed in shuffle.serve(
                self._allocated(),
                self._rows,
                window=at.window,
                skip=skip,
                progress=bar.update if replayed else None,
            ):
                bar.close()
                yield self._served(mixed, at.epoch)

    def start(self, epoch: int) -> LivePosition:
        """The position of the first batch of an epoch."""
        return LivePosition(epoch=epoch)

    def dropped(self, position: StreamPosition, epoch_batches: int) -> int:  # noqa: ARG002
        """Count the rows of this epoch after this rank's first `epoch_batches` batches; reads the rest of the text."""
        return self._rows.count_all() - epoch_batches * self.batch_size if self._rows is not None else 0

    def checked(
        self,
        position: StreamPosition,
        step: int,
        *,
        anyway: bool = False,  # noqa: ARG002  (the order of a live stream has not changed)
    ) -> LivePosition:
        """Check that a position lies in the text and that a window can have had `step` batches.

        Raises:
            ValueError: it does not, or it is a position in a cache.
        """
        at = live(position)
        shuffle = self._row_shuffle(at.epoch)
        most = shuffle.window_size(at.window) + shuffle.window_size(at.window + 1)
        if step > -(-most // self.batch_size):
            raise ValueError(
                f"the position of the checkpoint is {step:,} batches into a window of {most:,} rows at most: take "
                "another checkpoint"
            )
        start = at.rows.blocks.start if at.rows else None
        if start is not None:
            self.text.documents.check(start)
        return at

    def rescaled(self, table: Sequence[RankProgress]) -> tuple[LivePosition, int]:
        """Find where to continue with another number of ranks.

        Args:
            table: the progress of every rank that was training before.

        Returns:
            A position, the same for every present rank, and the number of rows that will be served a second time. These
            are the rows that an earlier rank had already served from its frontier on: the first segment in its current
            window.
        """
        fronts = [_frontier(live(progress.position)) for progress in table]
        again = sum(front.since + progress.rows for front, progress in zip(fronts, table, strict=True))
        places = [
            (*front.start.at, front.start.segment) if front.start is not None else (0, 0, 0)
            for front in fronts
        ]
        first = min(range(len(places)), key=places.__getitem__)
        start = fronts[first].start
        text = TextPosition(
            at=places[first][:2],
            reader=start.reader if start else None,
            dealing=self.text.documents.dealt_again(start, places, len(table)),
        )
        rows = RowPosition(blocks=BlockPosition(start=text))
        return LivePosition(epoch=table[0].position.epoch, rows=rows), again

    def row_age(self, position: StreamPosition, step: int) -> float:
        """Mean number of rows served between computing a row and serving it, for batch `step` of a window.

        Rows of a window are computed evenly while the window before it is served, and are served in random order.
        """
        at = live(position)
        before = self._row_shuffle(at.epoch).window_size(at.window - 1) if at.window else 0
        return before / 2 + max(step - 0.5, 0.0) * self.batch_size

    @property
    def counts(self) -> dict[str, int]:
        """Counts of this epoch since `batches` was called: `documents`, `tokens`, `outliers`, `empty` documents."""
        rows = self._rows
        return {
            "documents": rows.blocks.documents if rows else 0,
            "tokens": rows.tokens if rows else 0,
            "outliers": rows.outliers if rows else 0,
            "empty": rows.blocks.empty if rows else 0,
        }

    def drain(self) -> None:
        """Run the model on the rest of the epoch without serving batches, so that `writer` receives all rows."""
        if self._rows is not None:
            self._rows.drain()

    def sync(self) -> None:
        """Do nothing: this stream writes no file."""

    def close(self) -> None:
        """End the thread and free the buffer."""
        self._close_rows()
        self._buffers = []

    def _close_rows(self) -> None:
        if self._rows is not None:
            self._rows.close()
        self._rows = None

    def _served(self, mixed: Mixed[RowPosition], epoch: int) -> Served:
        *rows, provenance = mixed.tensors
        names = [point.name for point in self.model.hook_points]
        return Served(
            rows=dict(zip(names, rows, strict=True)),
            origins=lambda: provenance,
            certain=mixed.certain,
            certain_rows=mixed.certain_rows,
            position=LivePosition(epoch=epoch, window=mixed.window, rows=mixed.start),
            step=mixed.step + 1,
        )

    def _arrivals(self, at: LivePosition) -> RowArrivals:
        start = at.rows or RowPosition(blocks=BlockPosition())
        chunks = self.text.chunks(at.epoch, start.blocks.start)
        blocks = BlockArrivals(chunks, start.blocks)
        enter = at.rows is not None
        computed = partial(
            computed_batches,
            self.model,
            self._mixed_blocks(at.epoch, blocks, start.blocks),
            self.inference_batch_size,
            self.max_norms,
            start.batch if enter else 0,
        )
        if self.ahead and self._cuda is None:
            self._cuda = cuda_stream(self.model.device)
        batches = (
            Prefetch(computed, self.ahead, ComputedBatch.tensors, self._cuda) if self.ahead else computed()
        )
        try:
            return RowArrivals(
                blocks=blocks,
                computed=batches,
                buffers=self._allocated(),
                writer=self.writer,
                start=start,
                enter=enter,
            )
        except BaseException:
            batches.close()
            raise

    def _mixed_blocks(
        self, epoch: int, blocks: BlockArrivals, start: BlockPosition
    ) -> Iterator[Mixed[BlockPosition]]:
        step, length = self.text.packing.blocks, self.text.packing.seq_length
        capacity = max(step, min(POOL_BLOCKS, POOL_TOKENS // length) // step * step) if self.pool else step
        shuffle = RotatingShuffle(
            batch_size=step, capacity=capacity, first_window=step, entropy=(self.seed, self.rank, epoch, 1)
        )
        blocks.pool = Blocks.empty(capacity, length).tensors()
        return shuffle.serve(blocks.pool, blocks, window=start.window, skip=start.skip)

    def _row_shuffle(self, epoch: int) -> RotatingShuffle:
        return RotatingShuffle(
            batch_size=self.batch_size,
            capacity=self.buffer_rows,
            first_window=self.batch_size * min(FIRST_WINDOW, self.buffer_rows // self.batch_size),
            entropy=(self.seed, self.rank, epoch, 0),
        )

    def _allocated(self) -> list[Tensor]:
        if not self._buffers:
            self._buffers = [
                torch.empty(
                    self.buffer_rows + 1,
                    point.d_in,
                    dtype=self.model.dtypes[point.name],
                    device=self.buffer_device,
                )
                for point in self.model.hook_points
            ]
            self._buffers.append(torch.empty(self.buffer_rows, len(PROVENANCE), dtype=torch.int64))
        return self._buffers

    def _bar(self, replayed: int) -> tqdm:  # type: ignore[type-arg]
        return tqdm(
            total=replayed,
            desc="computing the buffer again",
            unit="row",
            unit_scale=True,
            disable=not (replayed and self.show_progress),
            leave=False,
        )


def live(position: StreamPosition) -> LivePosition:
    """Check that a position is one in a live stream, and return it.

    Raises:
        ValueError: it is a position in a cache.
    """
    if isinstance(position, LivePosition):
        return position
    raise ValueError(
        "the checkpoint has a position in a cache, but this run computes activations live: give the same shards= or "
        "write_shards= as before"
    )


def _frontier(position: LivePosition) -> BlockPosition:
    """The block position whose `start` is the frontier: all segments before it were served when the window began."""
    return position.rows.blocks if position.rows is not None else BlockPosition()
