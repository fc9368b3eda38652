"""Pack documents into blocks: cut segments, fit them into blocks, batch blocks for the model.

Pure: no model, no dataset. A segment is at most `seq_length` tokens of one document, cut from the document's own
start; a block is `seq_length` positions that hold whole segments. Blocks come in chunks of a fixed number of
blocks, each packed from consecutive segments alone, so that a chunk can be made again from its first segment.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deeplens_lightning.options import Isolation
from deeplens_lightning.types import TextPosition

PAD = -1
"""What `positions` and `documents` hold where a block holds no token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedDocument:
    """One document as token ids.

    Attributes:
        position: documents read from there begin with this one; segments before its `segment` were served before.
        index: its number in the source.
        hash: 64-bit hash of its text, signed.
        tokens: int64 `(tokens,)`, without special tokens around them; may be empty.
    """

    position: TextPosition
    index: int
    hash: int
    tokens: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """`n` blocks. All tensors are `(n, seq_length)`, int64 but for `keep`."""

    tokens: Tensor
    """Token ids, 0 at pads."""
    positions: Tensor
    """Position inside the segment: it restarts at each. -1 at pads."""
    documents: Tensor
    """Index of the document in the source. -1 at pads."""
    hashes: Tensor
    """64-bit hash of the document's text. 0 at pads."""
    offsets: Tensor
    """Position in the document; -1 at pads and at the special tokens that were put around a segment."""
    keep: Tensor
    """bool: the token becomes a row."""

    def __len__(self) -> int:
        return len(self.tokens)

    def tensors(self) -> tuple[Tensor, ...]:
        """The fields in the order of their definition, which is what `Blocks.of` takes."""
        return self.tokens, self.positions, self.documents, self.hashes, self.offsets, self.keep

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Blocks:
        """The inverse of `tensors`."""
        tokens, positions, documents, hashes, offsets, keep = tensors
        return cls(
            tokens=tokens,
            positions=positions,
            documents=documents,
            hashes=hashes,
            offsets=offsets,
            keep=keep,
        )

    @classmethod
    def empty(cls, n: int, seq_length: int) -> Blocks:
        """`n` blocks of pads."""

        def filled(value: int) -> Tensor:
            return torch.full((n, seq_length), value, dtype=torch.int64)

        return cls(
            tokens=filled(0),
            positions=filled(PAD),
            documents=filled(PAD),
            hashes=filled(0),
            offsets=filled(PAD),
            keep=torch.zeros(n, seq_length, dtype=torch.bool),
        )

    def select(self, index: Tensor) -> Blocks:
        """The blocks of an int64 index `(m,)`."""
        return Blocks.of([tensor[index] for tensor in self.tensors()])


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How documents become blocks.

    Attributes:
        seq_length: positions of a block, and the most that a segment may take, its special tokens included.
        blocks: blocks of a chunk.
        prefix: token ids put before every segment (a BOS, say).
        suffix: token ids put behind every segment (BERT's [SEP], say).
        excluded: token ids that never become rows.
        drop_first_n: tokens at the start of every segment that do not become rows.
        alone: one segment a block.
    """

    seq_length: int
    blocks: int
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    excluded: tuple[int, ...] = ()
    drop_first_n: int = 0
    alone: bool = False

    def __post_init__(self) -> None:
        if self.segment_tokens < 1:
            raise ValueError(
                f"seq_length={self.seq_length} leaves no room for text beside the model's "
                f"{len(self.prefix) + len(self.suffix)} special tokens; make it larger"
            )
        if self.drop_first_n >= self.segment_tokens:
            raise ValueError(
                f"drop_first_n={self.drop_first_n} would drop every token of a segment of {self.seq_length}; "
                "make it smaller than seq_length"
            )

    @property
    def segment_tokens(self) -> int:
        """Tokens of the document itself that a segment can hold."""
        return self.seq_length - len(self.prefix) - len(self.suffix)

    def chunks(self, documents: Iterable[TokenizedDocument]) -> Iterator[Chunk]:
        """Pack documents into chunks, all of `blocks` blocks but the last.

        A chunk takes as many of the next segments as fit into its blocks, which is nearly all that their lengths
        allow. A document may end in a later chunk than it began in; its segments stay whole.
        """
        waiting: deque[_Segment] = deque()
        room = empty = 0
        for document in documents:
            empty += not len(document.tokens)
            segments = -(-len(document.tokens) // self.segment_tokens)
            for number in range(document.position.segment, segments):
                waiting.append(_Segment.cut(self, document, number))
                room += waiting[-1].room
            while room > self.blocks * self.seq_length:
                yield self._chunk(waiting, empty)
                room, empty = sum(segment.room for segment in waiting), 0
        while waiting:
            yield self._chunk(waiting, empty)
            empty = 0

    def _chunk(self, waiting: deque[_Segment], empty: int) -> Chunk:
        """Take the longest run of segments that fits."""
        rooms = list(_while_sum((s.room for s in waiting), self.blocks * self.seq_length))
        left: list[int] = []
        while (places := best_fit(rooms, self.blocks, self.seq_length)) is None:
            left.append(rooms.pop())
        opened = max(row for row, _ in places) + 1
        while left and opened < self.blocks:  # rare: one segment less, and a whole block is free
            left.pop()
            places.append((opened, 0))
            opened += 1
        segments = [waiting.popleft() for _ in places]
        blocks = Blocks.empty(opened, self.seq_length)
        arrays = [tensor.numpy() for tensor in blocks.tensors()]
        for segment, (row, column) in zip(segments, places, strict=True):
            segment.write(self, arrays, row, column)
        if self.excluded:
            blocks.keep.logical_and_(torch.isin(blocks.tokens, torch.tensor(self.excluded)).logical_not())
        if self.drop_first_n:
            blocks.keep.logical_and_(blocks.positions >= self.drop_first_n)
        first = segments[0]
        return Chunk(
            start=replace(first.document.position, segment=first.number),
            blocks=blocks,
            documents=sum(segment.number == 0 for segment in segments),
            empty=empty,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Packed blocks, and the place of their first segment.

    Attributes:
        start: the first segment's place in the text.
        blocks: the packed blocks.
        documents: documents that began in this chunk.
        empty: documents without a token that were read since the chunk before.
    """

    start: TextPosition
    blocks: Blocks
    documents: int
    empty: int


@dataclass(frozen=True, slots=True)
class _Segment:
    """A segment to be packed.

    Attributes:
        document: the document that it is cut from.
        number: its number in the document.
        begin: its first token in the document.
        text: tokens of the document in it.
        length: the same with special tokens.
        room: positions that it takes of a block.
    """

    document: TokenizedDocument
    number: int
    begin: int
    text: int
    length: int
    room: int

    @classmethod
    def cut(cls, packing: Packing, document: TokenizedDocument, number: int) -> _Segment:
        begin = number * packing.segment_tokens
        text = min(packing.segment_tokens, len(document.tokens) - begin)
        length = len(packing.prefix) + text + len(packing.suffix)
        return cls(document, number, begin, text, length, packing.seq_length if packing.alone else length)

    def write(self, packing: Packing, arrays: Sequence[NDArray[Any]], row: int, column: int) -> None:
        """Put it into blocks, given as arrays in the order of their fields."""
        tokens, positions, documents, hashes, offsets, keep = (array[row] for array in arrays)
        first = column + len(packing.prefix)
        end, last = first + self.text, column + self.length
        tokens[column:first] = packing.prefix
        tokens[first:end] = self.document.tokens[self.begin : self.begin + self.text]
        tokens[end:last] = packing.suffix
        positions[column:last] = np.arange(self.length)
        documents[column:last] = self.document.index
        hashes[column:last] = self.document.hash
        offsets[first:end] = np.arange(self.begin, self.begin + self.text)
        keep[column:last] = True


def best_fit(lengths: Sequence[int], blocks: int, seq_length: int) -> list[tuple[int, int]] | None:
    """Best-fit decreasing: the longest first, each where it leaves the least room.

    Returns:
        The block and the first position of each segment, blocks counted from 0; None if they do not fit.
    """
    free: list[tuple[int, int]] = []
    places = [(0, 0)] * len(lengths)
    opened = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(free, (lengths[i], -1))
        if at < len(free):
            room, row = free.pop(at)
        elif opened < blocks:
            room, row, opened = seq_length, opened, opened + 1
        else:
            return None
        places[i] = (row, seq_length - room)
        if room > lengths[i]:
            insort(free, (room - lengths[i], row))
    return places


def _while_sum(values: Iterable[int], limit: int) -> Iterator[int]:
    """The first values whose sum stays within a limit."""
    total = 0
    for value in values:
        total += value
        if total > limit:
            return
        yield value


def model_batches(blocks: Blocks, size: int, isolation: Isolation) -> list[Tensor]:
    """Split blocks into model batches of blocks that run fast together.

    - `packed`, `none`: blocks that hold one full segment first, since they take the plain causal path, which is faster;
    - `padded`: by length, so that little is padded;
    - `equal`: by length, and never two lengths in a batch.

    Returns:
        int64 indices of at most `size` blocks each, together every block once.
    """
    if isolation in ("packed", "none"):
        return list(torch.argsort(is_packed(blocks).long(), stable=True).split(size))
    lengths = (blocks.positions >= 0).sum(1)
    order = torch.argsort(lengths, stable=True)
    if isolation == "padded":
        return list(order.split(size))
    runs = torch.unique_consecutive(lengths[order], return_counts=True)[1]
    return [batch for run in order.split(runs.tolist()) for batch in run.split(size)]


def is_packed(blocks: Blocks) -> Tensor:
    """Which blocks are not one full segment: bool `(n,)`."""
    return blocks.positions[:, -1] != blocks.positions.shape[1] - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInputs:
    """One model batch as `FrozenModel.activations` takes it.

    Attributes:
        tokens: int64 `(n, length)`.
        position_ids: int64 `(n, length)`, or None.
        attention_mask: int64 `(n, length)`, 1 at tokens, or None.
    """

    tokens: Tensor
    position_ids: Tensor | None = None
    attention_mask: Tensor | None = None


def model_inputs(blocks: Blocks, isolation: Isolation) -> ModelInputs:
    """The tokens of one model batch, with the positions or the mask that keep its segments apart.

    - `packed`: `position_ids`, left out where every block is one full segment; they restart at each segment and
      count the pads as one more segment.
    - `padded`: `attention_mask`; `length` is that of the longest segment.
    - `equal`: neither; `length` is that of the segments.
    - `none`: neither; `length` is `seq_length`.
    """
    if isolation in ("packed", "none"):
        if isolation == "none" or not bool(is_packed(blocks).any()):
            return ModelInputs(tokens=blocks.tokens)
        pads = blocks.positions < 0
        position_ids = torch.where(pads, pads.cumsum(1) - 1, blocks.positions)
        return ModelInputs(tokens=blocks.tokens, position_ids=position_ids)
    mask = blocks.positions >= 0
    length = int(mask.sum(1).max())
    tokens = blocks.tokens[:, :length]
    if isolation == "equal":
        return ModelInputs(tokens=tokens)
    return ModelInputs(tokens=tokens, attention_mask=mask[:, :length].long())
