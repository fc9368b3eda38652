"""Segments of token ids, and their rows when they share model batches."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.options import Isolation


def segment(length: int) -> Tensor:
    """Random token ids, int64 `(length,)`, the same ones for the same length."""
    return torch.randint(10, 97, (length,), generator=torch.Generator().manual_seed(length))


SEGMENTS = [segment(length) for length in (9, 33, 1, 14)]


def together(model: FrozenModel, segments: Sequence[Tensor], mode: Isolation) -> list[dict[str, Tensor]]:
    """Rows of each segment, when the segments share model batches with this isolation."""
    if mode == "equal":
        return [
            {k: x[:1] for k, x in model.activations(torch.stack([s, s.flip(0)])).items()} for s in segments
        ]
    if mode == "padded":
        tokens = nn.utils.rnn.pad_sequence(list(segments), batch_first=True)
        mask = torch.stack([(torch.arange(tokens.shape[1]) < len(s)).long() for s in segments])
        rows = model.activations(tokens, attention_mask=mask)
        return [{k: x[i : i + 1, : len(s)] for k, x in rows.items()} for i, s in enumerate(segments)]
    positions = torch.cat([torch.arange(len(s)) for s in segments])
    rows = model.activations(torch.cat(list(segments))[None], position_ids=positions[None])
    ends = torch.tensor([len(s) for s in segments]).cumsum(0).tolist()
    return [
        {k: x[:, end - len(s) : end] for k, x in rows.items()} for s, end in zip(segments, ends, strict=True)
    ]
