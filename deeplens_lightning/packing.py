"""Documents to segments to blocks. Pure: no model, no dataset.

A segment is at most `seq_length` tokens of one document, cut from the document's own start; a block is
`seq_length` positions that hold whole segments. Blocks come in chunks of a fixed number of blocks, each packed
from consecutive segments alone, so that a chunk can be made again from its first segment.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

PAD = -1
"""What `positions` and `documents` hold where a block holds no token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedDocument:
    """One document: where it stands, what it is, what it says.

    Attributes:
        cursor: JSON-like; documents read from there begin with this one.
        index: its number in the source.
        hash: 64-bit hash of its text, signed.
        tokens: int64 `(tokens,)`, without special tokens around them.
        first_segment: segments of it that were served before and are left out.
    """

    cursor: dict[str, Any]
    index: int
    hash: int
    tokens: np.ndarray[Any, np.dtype[np.int64]]
    first_segment: int = 0


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
        return tuple(getattr(self, f.name) for f in fields(self))

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Blocks:
        """The inverse of `tensors`."""
        return cls(**{f.name: tensor for f, tensor in zip(fields(cls), tensors, strict=True)})

    @classmethod
    def empty(cls, n: int, seq_length: int) -> Blocks:
        """`n` blocks of pads."""
        fills = {"tokens": 0, "positions": PAD, "documents": PAD, "hashes": 0, "offsets": PAD, "keep": False}
        dtypes = {"keep": torch.bool}
        return cls(
            **{
                name: torch.full((n, seq_length), fill, dtype=dtypes.get(name, torch.int64))
                for name, fill in fills.items()
            }
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

        A document may end in a later chunk than it began in; its segments stay whole.
        """
        chunk: _Filling | None = None
        for document in documents:
            for segment in range(document.first_segment, -(-len(document.tokens) // self.segment_tokens)):
                if chunk is None or not chunk.place(document, segment):
                    if chunk is not None:
                        yield chunk.close()
                    chunk = _Filling(self, {"document": document.cursor, "segment": segment})
                    chunk.place(document, segment)
        if chunk is not None:
            yield chunk.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Packed blocks, and where their first segment stands.

    Attributes:
        start: JSON-like: `document`, the cursor of the first document, and `segment`, its first segment here.
        blocks: the blocks, in the order in which they were opened.
        documents: documents that began in this chunk.
    """

    start: dict[str, Any]
    blocks: Blocks
    documents: int


@dataclass(slots=True)
class _Filling:
    """A chunk being packed: best fit among its own blocks."""

    packing: Packing
    start: dict[str, Any]
    free: list[tuple[int, int]] = field(default_factory=list)
    opened: int = 0
    documents: int = 0
    blocks: Blocks = field(init=False)

    def __post_init__(self) -> None:
        self.blocks = Blocks.empty(self.packing.blocks, self.packing.seq_length)

    def place(self, document: TokenizedDocument, segment: int) -> bool:
        """Put a segment where it leaves the least room, or say that it fits nowhere."""
        packing = self.packing
        begin = segment * packing.segment_tokens
        text = document.tokens[begin : begin + packing.segment_tokens]
        length = len(packing.prefix) + len(text) + len(packing.suffix)
        at = bisect_left(self.free, (length, -1))
        if at < len(self.free):
            room, row = self.free.pop(at)
        elif self.opened < packing.blocks:
            room, row = packing.seq_length, self.opened
            self.opened += 1
        else:
            return False
        if room > length and not packing.alone:
            insort(self.free, (room - length, row))
        first = packing.seq_length - room
        body = slice(first + len(packing.prefix), first + len(packing.prefix) + len(text))
        whole = slice(first, first + length)
        tokens, positions, documents, hashes, offsets, keep = self._arrays()
        tokens[row, whole] = (*packing.prefix, *text, *packing.suffix)
        positions[row, whole] = np.arange(length)
        documents[row, whole] = document.index
        hashes[row, whole] = document.hash
        offsets[row, body] = np.arange(begin, begin + len(text))
        keep[row, whole] = True
        self.documents += segment == 0
        return True

    def close(self) -> Chunk:
        """The chunk's blocks, with what is not wanted taken out of `keep`."""
        blocks = Blocks.of([tensor[: self.opened] for tensor in self.blocks.tensors()])
        if self.packing.excluded:
            blocks.keep.logical_and_(
                torch.isin(blocks.tokens, torch.tensor(self.packing.excluded)).logical_not()
            )
        if self.packing.drop_first_n:
            blocks.keep.logical_and_(blocks.positions >= self.packing.drop_first_n)
        return Chunk(start=self.start, blocks=blocks, documents=self.documents)

    def _arrays(self) -> tuple[np.ndarray[Any, Any], ...]:
        return tuple(tensor.numpy() for tensor in self.blocks.tensors())


def model_batches(blocks: Blocks, size: int, isolation: str) -> list[Tensor]:
    """Split blocks into model batches, like beside like.

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


def model_inputs(blocks: Blocks, isolation: str) -> dict[str, Tensor]:
    """The tokens of one model batch, and what keeps its segments apart, as `FrozenModel.activations` takes them.

    Returns:
        `tokens` `(n, length)`; in the `packed` mode `position_ids` (left out where every block is one full
        segment), which restart at each segment and count the pads as one more; in the `padded` mode
        `attention_mask`. `length` is `seq_length`, or the longest segment where each has a row of its own.
    """
    if isolation in ("packed", "none"):
        if isolation == "none" or not bool(is_packed(blocks).any()):
            return {"tokens": blocks.tokens}
        pads = blocks.positions < 0
        return {
            "tokens": blocks.tokens,
            "position_ids": torch.where(pads, pads.cumsum(1) - 1, blocks.positions),
        }
    mask = blocks.positions >= 0
    length = int(mask.sum(1).max())
    tokens = blocks.tokens[:, :length]
    return (
        {"tokens": tokens}
        if isolation == "equal"
        else {"tokens": tokens, "attention_mask": mask[:, :length].long()}
    )
