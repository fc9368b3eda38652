"""Text to batches: composes documents, packing, the frozen model and the rotating shuffle.

    documents -> chunks of blocks -> mixed blocks -> model batches -> rows -> mixed rows -> batches

The two shuffles nest: the row shuffle's source is the model, fed by the block shuffle, whose source is the text.
So do positions: where a window of rows began is where a model batch began, inside a window of blocks, which
began at a document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.model.rows import run_model
from deeplens_lightning.stream.rotating_shuffle import Mixed, RotatingShuffle
from deeplens_lightning.text.documents import Documents
from deeplens_lightning.text.packing import Blocks, Chunk, Packing, model_batches
from deeplens_lightning.types import PROVENANCE, Served

GROUPED = 32
"""Model batches whose blocks are sorted, like beside like, before they run."""
POOL_BLOCKS, POOL_TOKENS = 4096, 2**19
FIRST_WINDOW = 4
"""Batches of the first window: what must be computed before the first batch is served."""


@dataclass(kw_only=True)
class ActivationStream:
    """One rank's batches of activations, computed on the way.

    Attributes:
        model: run up to the deepest hook point.
        documents: what this rank reads.
        packing: how it becomes blocks; its `blocks` are `GROUPED` model batches.
        batch_size: rows a batch.
        buffer_rows: slots of the buffer, a multiple of `batch_size`.
        buffer_device: where the buffer and so the batches are.
        inference_batch_size: blocks a model batch.
        seed: of both shuffles.
        pool: whether blocks are shuffled before the model.
        max_norms: rows with a larger norm at a hook point of this name are dropped.
        show_progress: a bar while rows are computed again.
        on_rows: called with the rows of every model batch by hook point, their provenance, and the number of the
            first of them in the epoch; at the end with None.
    """

    model: FrozenModel
    documents: Documents
    packing: Packing
    batch_size: int
    buffer_rows: int
    buffer_device: torch.device
    inference_batch_size: int
    seed: int
    pool: bool = True
    max_norms: Mapping[str, float] = field(default_factory=dict)
    show_progress: bool = True
    on_rows: Callable[[Mapping[str, Tensor] | None, Tensor, int], None] | None = None
    _buffers: list[Tensor] = field(init=False, default_factory=list)
    _rows: _RowArrivals | None = field(init=False, default=None)

    @property
    def buffer_bytes(self) -> int:
        """Size of the buffer of activations."""
        row = sum(point.d_in * self.model.dtypes[point.name].itemsize for point in self.model.hook_points)
        return self.buffer_rows * row

    def batches(self, position: dict[str, Any] | None = None, skip: int = 0) -> Iterator[Served]:
        """See `served.Stream`. A position names at least the epoch: `{"epoch": 3}` is where it begins."""
        position = position or {"epoch": 0}
        epoch, window = position["epoch"], position.get("window", 0)
        buffers = self._allocated()
        self._rows = _RowArrivals(self, epoch, position.get("rows"), buffers)
        shuffle = self._shuffle(epoch)
        replayed = shuffle.rows_to_replay(window, skip) if window or skip else 0
        names = [point.name for point in self.model.hook_points]
        with tqdm(
            total=replayed,
            desc="computing the buffer again",
            unit="row",
            unit_scale=True,
            disable=not (replayed and self.show_progress),
            leave=False,
        ) as bar:
            progress = bar.update if replayed else None
            for mixed in shuffle.serve(buffers, self._rows, window=window, skip=skip, progress=progress):
                bar.close()
                *rows, provenance = mixed.tensors
                yield Served(
                    rows=dict(zip(names, rows, strict=True)),
                    provenance=provenance,
                    certain=mixed.certain,
                    certain_rows=mixed.certain_rows,
                    position={"epoch": epoch, "window": mixed.window, "rows": mixed.start},
                    step=mixed.step + 1,
                )

    def start(self, epoch: int) -> dict[str, Any]:
        """Where an epoch begins."""
        return {"epoch": epoch}

    def dropped(self, position: dict[str, Any], epoch_batches: int) -> int:  # noqa: ARG002
        """Rows of this epoch that this rank has beyond so many batches; reads what is left of its text."""
        return self._rows.count_all() - epoch_batches * self.batch_size if self._rows is not None else 0

    def rescaled(self, table: Sequence[tuple[dict[str, Any], int, int]]) -> tuple[dict[str, Any], int]:
        """Go on with another number of ranks.

        Args:
            table: of every old rank: a position, and the batches and rows served since.

        Returns:
            A position for every new rank, and how many rows are served again: a document is, when it lies at
            or beyond the frontier of the rank that had it.
        """
        fronts = [frontier(position) for position, _, _ in table]
        again = sum(since + rows for (_, _, since), (_, _, rows) in zip(fronts, table, strict=True))
        places = [(*cursor["at"], segment) if cursor else (0, 0, 0) for cursor, segment, _ in fronts]
        first = min(range(len(places)), key=places.__getitem__)
        cursor = fronts[first][0]
        document = {
            "at": list(places[first][:2]),
            "state": cursor["state"] if cursor else None,
            "dealing": self.documents.dealt_again(cursor, places, len(table)),
        }
        blocks = {
            "window": 0,
            "start": {"document": document, "segment": 0},
            "kept": 0,
            "skip": 0,
            "since": 0,
        }
        rows = {"blocks": blocks, "batch": 0, "row": 0, "outliers": 0, "made": 0}
        return {"epoch": table[0][0]["epoch"], "window": 0, "rows": rows}, again

    def row_age(self, position: dict[str, Any], step: int) -> float:
        """Rows served between the computing of a row and its own batch: the mean over the batch `step` of a window.

        Rows of a window arrive evenly while the one before it is served, and are served in random order.
        """
        window = position.get("window", 0)
        before = self._shuffle(position["epoch"]).window_size(window - 1) if window else 0
        return before / 2 + max(step - 0.5, 0.0) * self.batch_size

    @property
    def counts(self) -> dict[str, int]:
        """Counts of this epoch since the stream was entered: `documents`, `tokens`, `outliers`, `empty`."""
        rows = self._rows
        return {
            "documents": rows.blocks.documents if rows else 0,
            "tokens": rows.tokens if rows else 0,
            "outliers": rows.outliers if rows else 0,
            "empty": self.documents.empty,
        }

    def drain(self) -> None:
        """Run what is left of the epoch for `on_rows` alone."""
        if self._rows is not None:
            self._rows.drain()

    def close(self) -> None:
        """Let go of the buffer."""
        self._buffers, self._rows = [], None

    def _shuffle(self, epoch: int) -> RotatingShuffle:
        return RotatingShuffle(
            batch_size=self.batch_size,
            capacity=self.buffer_rows,
            first_window=self.batch_size * min(FIRST_WINDOW, self.buffer_rows // self.batch_size),
            entropy=(self.seed, self.documents.rank, epoch, 0),
        )

    def _allocated(self) -> list[Tensor]:
        if not self._buffers:
            self._buffers = [
                torch.empty(
                    self.buffer_rows,
                    point.d_in,
                    dtype=self.model.dtypes[point.name],
                    device=self.buffer_device,
                )
                for point in self.model.hook_points
            ]
            self._buffers.append(torch.empty(self.buffer_rows, len(PROVENANCE), dtype=torch.int64))
        return self._buffers


def frontier(position: dict[str, Any]) -> tuple[dict[str, Any] | None, int, int]:
    """What a position of `ActivationStream` says about documents.

    Returns:
        The cursor of the first document of which not every row was served when the window began (None: the
        epoch's first), its first segment for which that is so, and how many rows of the documents from there on
        had been served by then.
    """
    if position.get("rows") is None:
        return None, 0, 0
    blocks = position["rows"]["blocks"]
    start = blocks["start"]
    return (start["document"], start["segment"], blocks["since"]) if start else (None, 0, blocks["since"])


class _BlockArrivals:
    """Chunks of an epoch's documents, written into the pool of blocks."""

    def __init__(self, stream: ActivationStream, epoch: int, start: dict[str, Any] | None, kept: int) -> None:
        documents = stream.documents.read(epoch, start["document"] if start else None)
        if start and (first := next(documents, None)) is not None:
            segment = max(first.first_segment, start["segment"])
            documents = chain([replace(first, first_segment=segment)], documents)
        self.chunks = stream.packing.chunks(documents)
        self.seq_length = stream.packing.seq_length
        self.pool: Sequence[Tensor] = ()
        self.documents = 0
        self.kept = kept
        self.taken = 0
        self.start = start
        self.chunk: Chunk | None = None
        self._next()

    def position(self) -> dict[str, Any]:
        """The start of the next chunk: windows of the pool begin with one."""
        return {"start": self.start if self.chunk is None else self.chunk.start, "kept": self.kept}

    def fill(self, slots: Tensor) -> int:
        filled = 0
        while filled < len(slots) and self.chunk is not None:
            blocks = self.chunk.blocks
            count = min(len(slots) - filled, len(blocks) - self.taken)
            for pool, tensor in zip(self.pool, blocks.tensors(), strict=True):
                pool[slots[filled : filled + count]] = tensor[self.taken : self.taken + count]
            filled, self.taken = filled + count, self.taken + count
            if self.taken == len(blocks):
                self.kept += int(blocks.keep.sum())
                self._next()
        return filled

    def count_all(self) -> int:
        """Rows of the whole epoch; reads it to the end."""
        while self.chunk is not None:
            self.kept += int(self.chunk.blocks.keep.sum())
            self._next()
        return self.kept

    def _next(self) -> None:
        self.chunk, self.taken = next(self.chunks, None), 0
        self.documents += self.chunk.documents if self.chunk else 0


class _RowArrivals:
    """The model's rows, batch after batch, written into the buffer."""

    def __init__(
        self, stream: ActivationStream, epoch: int, position: dict[str, Any] | None, buffers: Sequence[Tensor]
    ) -> None:
        at = position or {
            "blocks": {"window": 0, "start": None, "kept": 0, "skip": 0, "since": 0},
            "batch": 0,
            "row": 0,
            "outliers": 0,
            "made": 0,
        }
        self.stream, self.buffers = stream, buffers
        pooled = at["blocks"]
        self.blocks = _BlockArrivals(stream, epoch, pooled["start"], pooled["kept"])
        self.pool = self._mixed_blocks(epoch, pooled["window"], pooled["skip"])
        self.tokens = 0
        self.outliers: int = at["outliers"]
        self.outliers_here = 0
        self.made: int = at["made"]
        self.since = pooled["since"]
        self.here: dict[str, Any] = pooled
        self.work: list[Blocks] = []
        self.batch = -1
        self.row = 0
        self.out: dict[str, Tensor] = {}
        self.wanted = torch.empty(0, dtype=torch.int64)
        self.provenance = torch.empty(0, len(PROVENANCE), dtype=torch.int64)
        if position is not None and self._load():
            self.batch = at["batch"] - 1
            if self._run():
                self.row = at["row"]
            self.since = pooled["since"]

    def position(self) -> dict[str, Any]:
        if self.batch < 0:
            self._advance()
        return {
            "blocks": {**self.here, "since": self.since},
            "batch": max(self.batch, 0),
            "row": self.row,
            "outliers": self.outliers - self.outliers_here,
            "made": self.made - len(self.wanted),
        }

    def fill(self, slots: Tensor) -> int:
        filled = 0
        while filled < len(slots):
            if self.row == len(self.wanted):
                if not self._advance():
                    break
                continue
            count = min(len(slots) - filled, len(self.wanted) - self.row)
            into, rows = slots[filled : filled + count], slice(self.row, self.row + count)
            for buffer, x in zip(self.buffers, self.out.values(), strict=False):
                chosen = x.index_select(0, self.wanted[rows].to(x.device))
                buffer.index_copy_(0, into.to(buffer.device), chosen.to(buffer.device))
            self.buffers[-1].index_copy_(0, into, self.provenance[rows])
            filled, self.row, self.since = filled + count, self.row + count, self.since + count
        return filled

    def count_all(self) -> int:
        return self.blocks.count_all() - self.outliers

    def _advance(self) -> bool:
        """Run the next model batch, if there is one."""
        if self._run() or (self._load() and self._run()):
            return True
        if self.stream.on_rows is not None:
            self.stream.on_rows(None, self.provenance[:0], self.made)
        return False

    def _load(self) -> bool:
        """Take the next blocks from the pool and sort them into model batches."""
        mixed = next(self.pool, None)
        if mixed is None:
            return False
        if mixed.window != self.here["window"]:
            self.since = 0
        self.here = {**mixed.start, "window": mixed.window, "skip": mixed.step}
        blocks = Blocks.of(mixed.tensors)
        size, isolation = self.stream.inference_batch_size, self.stream.model.isolation
        self.work = [blocks.select(index) for index in model_batches(blocks, size, isolation)]
        self.batch = -1
        return True

    def _run(self) -> bool:
        if self.batch + 1 >= len(self.work):
            return False
        self.batch, self.row = self.batch + 1, 0
        blocks = self.work[self.batch]
        self.out, self.wanted, self.provenance = run_model(self.stream.model, blocks)
        self.tokens += int((blocks.positions >= 0).sum())
        if self.stream.max_norms:
            fine = self._within_norms()
            self.outliers_here = int(len(fine) - fine.sum())
            self.outliers += self.outliers_here
            self.wanted, self.provenance = self.wanted[fine], self.provenance[fine]
        if self.stream.on_rows is not None:
            rows = {name: x.index_select(0, self.wanted.to(x.device)) for name, x in self.out.items()}
            self.stream.on_rows(rows, self.provenance, self.made)
        self.made += len(self.wanted)
        return True

    def drain(self) -> None:
        """Run the rest of the epoch."""
        while self._advance():
            pass

    def _within_norms(self) -> Tensor:
        fine = torch.ones(len(self.wanted), dtype=torch.bool)
        for name, limit in self.stream.max_norms.items():
            x = self.out[name]
            fine &= (x.index_select(0, self.wanted.to(x.device)).float().norm(dim=1) <= limit).cpu()
        return fine

    def _mixed_blocks(self, epoch: int, window: int, skip: int) -> Iterator[Mixed]:
        step, length = self.stream.packing.blocks, self.stream.packing.seq_length
        capacity = (
            max(step, min(POOL_BLOCKS, POOL_TOKENS // length) // step * step) if self.stream.pool else step
        )
        shuffle = RotatingShuffle(
            batch_size=step,
            capacity=capacity,
            first_window=step,
            entropy=(self.stream.seed, self.stream.documents.rank, epoch, 1),
        )
        self.blocks.pool = Blocks.empty(capacity, length).tensors()
        return shuffle.serve(self.blocks.pool, self.blocks, window=window, skip=skip)
