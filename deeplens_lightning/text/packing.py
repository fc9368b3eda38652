"""Pack documents into blocks: cut them into segments, fit segments into blocks, sort blocks into model batches.

Uses no model and no dataset. A segment is at most `seq_length` tokens of one document, counted from the document's
start. A block is `seq_length` positions that hold whole segments. A chunk is a fixed number of blocks, packed from
consecutive segments, so that the position of its first segment is enough to pack the same chunk again.
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
"""Value of `positions`, `documents` and `offsets` at pads: positions of a block without a token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedDocument:
    """One document as token ids.

    Attributes:
        position: position of the document in the text; segments before `position.segment` are not read.
        index: index of the document in the source.
        hash: signed 64-bit hash of the document's text.
        tokens: int64 `(tokens,)`, without the special tokens around a segment; may be empty.
    """

    position: TextPosition
    index: int
    hash: int
    tokens: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """`n` blocks of tokens. All tensors are `(n, seq_length)`, int64 except `keep`, which is bool."""

    tokens: Tensor
    """Token ids; 0 at pads."""
    positions: Tensor
    """Position of the token in its segment, from 0; -1 at pads."""
    documents: Tensor
    """Index of the document in the source; -1 at pads."""
    hashes: Tensor
    """64-bit hash of the document's text; 0 at pads."""
    offsets: Tensor
    """Position of the token in its document; -1 at pads and at the special tokens around a segment."""
    keep: Tensor
    """Whether the token becomes a row, bool; False at pads."""

    def __len__(self) -> int:
        return len(self.tokens)

    def tensors(self) -> tuple[Tensor, ...]:
        """The fields as a tuple, in the order of their definition; `Blocks.of` is the inverse."""
        return self.tokens, self.positions, self.documents, self.hashes, self.offsets, self.keep

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Blocks:
        """Make `Blocks` from the fields in the order of their definition: the inverse of `tensors`."""
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
        """Make `n` blocks that hold only pads."""

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
        """Select `m` blocks by their numbers, int64 `(m,)`."""
        return Blocks.of([tensor[index] for tensor in self.tensors()])


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """Pack documents into blocks with fixed settings.

    Attributes:
        seq_length: length of a block in tokens, and the largest length of a segment with its special tokens.
        blocks: number of blocks in a chunk.
        prefix: token ids put before every segment, for example a BOS token.
        suffix: token ids put after every segment, for example BERT's [SEP].
        excluded: token ids that never become rows.
        drop_first_n: number of tokens at the start of every segment that do not become rows.
        alone: put only one segment in each block.

    Raises:
        ValueError: `seq_length` leaves no token for text, or `drop_first_n` would drop every token.
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
        """The largest number of tokens of the document in a segment: `seq_length` minus the special tokens."""
        return self.seq_length - len(self.prefix) - len(self.suffix)

    def chunks(self, documents: Iterable[TokenizedDocument]) -> Iterator[Chunk]:
        """Pack documents into chunks of `blocks` blocks; the last chunk may have fewer.

        Each chunk takes the next segments until no more fit into its blocks. A document may continue in the next chunk;
        a segment is never split.
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
        """Pack the largest number of next segments that fit into one chunk."""
        rooms = list(_while_sum((s.room for s in waiting), self.blocks * self.seq_length))
        left: list[int] = []
        while (places := best_fit(rooms, self.blocks, self.seq_length)) is None:
            left.append(rooms.pop())
        opened = max(row for row, _ in places) + 1
        while left and opened < self.blocks:  # rare: taking out one segment has freed a whole block
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
    """Packed blocks, and the position of their first segment.

    Attributes:
        start: position of the first segment in the text.
        blocks: the packed blocks.
        documents: number of documents that begin in this chunk.
        empty: number of documents without a token that were read since the previous chunk.
    """

    start: TextPosition
    blocks: Blocks
    documents: int
    empty: int


@dataclass(frozen=True, slots=True)
class _Segment:
    """A segment to be packed.

    Attributes:
        document: the document that the segment is cut from.
        number: number of the segment in the document.
        begin: position of its first token in the document.
        text: number of tokens of the document in it.
        length: number of its tokens, special tokens included.
        room: number of positions that it occupies in a block.
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
        """Write the segment into block `row` at position `column`; `arrays` are the fields of `Blocks` in order."""
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
    """Fit segments into blocks by best-fit decreasing: longest first, each into the fullest block that can hold it.

    Returns:
        For each of `lengths` the number of its block, from 0, and its first position there; None if they do not fit.
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
    """The longest run of first values whose sum is at most `limit`."""
    total = 0
    for value in values:
        total += value
        if total > limit:
            return
        yield value


def model_batches(blocks: Blocks, size: int, isolation: Isolation) -> list[Tensor]:
    """Sort blocks into model batches, so that blocks which run fast together are in the same batch.

    - `packed`, `none`: blocks with one full segment first, because they need no position ids and run faster;
    - `padded`: by length, so that there are few pads;
    - `equal`: by length, and only one length in each batch.

    Returns:
        For each model batch the numbers of its blocks, int64 `(at most size,)`. Every block is in exactly one batch.
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
    """Whether each block is anything but one full segment: bool `(n,)`."""
    return blocks.positions[:, -1] != blocks.positions.shape[1] - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInputs:
    """One model batch: the inputs of `FrozenModel.activations`.

    Attributes:
        tokens: token ids, int64 `(n, length)`.
        position_ids: int64 `(n, length)`; None for the model's default.
        attention_mask: int64 `(n, length)`, 1 at tokens and 0 at pads; None for no mask.
    """

    tokens: Tensor
    position_ids: Tensor | None = None
    attention_mask: Tensor | None = None


def model_inputs(blocks: Blocks, isolation: Isolation) -> ModelInputs:
    """The inputs of one model batch: token ids, and the position ids or the mask that keep its segments apart.

    - `packed`: `position_ids` that restart at each segment; pads count as one more segment. None if every block is
      one full segment.
    - `padded`: `attention_mask`; `length` is the length of the longest segment.
    - `equal`: no `position_ids` and no mask; `length` is the length of the segments.
    - `none`: no `position_ids` and no mask; `length` is `seq_length`.
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
