"""Turn held-out blocks or texts into padded model batches with one segment in each row.

A block may hold several segments in one row, and some models let them see each other. With one segment in a row and
an attention mask, every model computes each segment as if it were alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deeplens_lightning.text.packing import Blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """One model batch of segments, padded on the right; each tensor is `(batch, seq_length)`.

    Attributes:
        tokens: int64, 0 at pads.
        mask: int64, 1 at tokens and 0 at pads.
        keep: bool, positions whose activations the SAE trains on.
        scored: bool, kept positions whose next token belongs to the same document and segment.
    """

    tokens: Tensor
    mask: Tensor
    keep: Tensor
    scored: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Segment:
    """One segment; each tensor is `(seq_length,)`.

    Attributes:
        tokens: int64.
        keep: bool, positions whose activations the SAE trains on.
        joined: bool, whether the next token continues the same document.
    """

    tokens: Tensor
    keep: Tensor
    joined: Tensor


def from_blocks(
    blocks: Iterable[Blocks], rows: int, *, whole_rows: bool, batch_size: int
) -> Iterator[Segments]:
    """Split blocks into segments, in order, and batch them.

    Args:
        blocks: chunks of blocks.
        rows: stop when the segments have at least this number of kept positions; the last segment is taken whole.
        whole_rows: take each row of a block as one segment, for runs that do not isolate documents.
        batch_size: segments in a model batch.
    """
    found: list[_Segment] = []
    kept = 0
    for segment in (segment for chunk in blocks for segment in _split(chunk, whole_rows)):
        found.append(segment)
        kept += int(segment.keep.sum())
        if kept >= rows:
            break
    yield from _batches(found, batch_size)


def from_token_ids(
    rows: Iterable[tuple[Sequence[int], Sequence[bool]]], batch_size: int
) -> Iterator[Segments]:
    """Batch texts that are given as token ids.

    Args:
        rows: for each text its token ids, and for each token whether its activation is kept.
        batch_size: segments in a model batch.
    """
    found = [
        _Segment(
            tokens=torch.tensor(list(ids)),
            keep=torch.tensor(list(keep)),
            joined=torch.ones(len(ids), dtype=torch.bool),
        )
        for ids, keep in rows
    ]
    yield from _batches(found, batch_size)


def _split(chunk: Blocks, whole_rows: bool) -> Iterator[_Segment]:
    for tokens, positions, documents, keep in zip(
        chunk.tokens.cpu(), chunk.positions.cpu(), chunk.documents.cpu(), chunk.keep.cpu(), strict=True
    ):
        n = int((positions >= 0).sum())
        tokens, positions, documents, keep = tokens[:n], positions[:n], documents[:n], keep[:n]
        joined = torch.zeros(n, dtype=torch.bool)
        joined[:-1] = (documents[1:] == documents[:-1]) & (positions[1:] == positions[:-1] + 1)
        ends = [n] if whole_rows else [i + 1 for i in range(n) if not joined[i]]
        start = 0
        for end in ends:
            yield _Segment(tokens=tokens[start:end], keep=keep[start:end], joined=joined[start:end])
            start = end


def _batches(segments: Sequence[_Segment], batch_size: int) -> Iterator[Segments]:
    for start in range(0, len(segments), batch_size):
        group = segments[start : start + batch_size]
        shape = (len(group), max(len(segment.tokens) for segment in group))
        tokens, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        keep, scored = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
        for i, segment in enumerate(group):
            n = len(segment.tokens)
            tokens[i, :n], mask[i, :n], keep[i, :n] = segment.tokens, 1, segment.keep
            scored[i, : n - 1] = segment.keep[:-1] & segment.joined[:-1]
        yield Segments(tokens=tokens, mask=mask, keep=keep, scored=scored)
