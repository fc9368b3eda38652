"""Held-out blocks as plain padded segments, which every model keeps apart.

A block may hold several segments in one row, which some models mix up. For a few thousand tokens of
evaluation, one segment a row and an attention mask is simple and always right.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deeplens_lightning.text.packing import Blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """Segments padded on the right, `(batch, seq_length)` each.

    Attributes:
        tokens: int64, 0 at pads.
        mask: int64, 0 at pads.
        keep: bool, positions whose activations the SAE is trained on.
        scored: bool, kept positions whose next token belongs to the same segment.
    """

    tokens: Tensor
    mask: Tensor
    keep: Tensor
    scored: Tensor


@dataclass(frozen=True, slots=True)
class _Segment:
    tokens: Tensor
    keep: Tensor
    joined: Tensor  # whether the next token continues the same document


def from_blocks(
    blocks: Iterable[Blocks], rows: int, *, whole_rows: bool, batch_size: int
) -> Iterator[Segments]:
    """Segments of blocks, in their order, some to a batch.

    Args:
        blocks: chunks of blocks.
        rows: stop once so many positions are kept.
        whole_rows: documents are not isolated, so that a row of a block is one context.
        batch_size: segments to a batch.
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
    """Segments of texts given as token ids and which of them to keep."""
    found = [
        _Segment(torch.tensor(list(ids)), torch.tensor(list(keep)), torch.ones(len(ids), dtype=torch.bool))
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
            yield _Segment(tokens[start:end], keep[start:end], joined[start:end])
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
