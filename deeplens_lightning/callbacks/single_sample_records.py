"""Numbers for each token of one text at one training step: norm, error, L0, strongest latents.

In: raw activations `(seq_length, d_in)` by hook point, and an SAE. Out: a `SampleRecord`, and the JSON objects, the
table and the picture that `ExtractSingleSample` writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deeplens_lightning.callbacks.sae_view import SaeView, side_by_side
from deeplens_lightning.reporting.figures import figure_pixels, plot_sample
from deeplens_lightning.reporting.loggers import Cell
from deeplens_lightning.reporting.readable_tokens import readable

TABLE_COLUMNS = ("position", "token", "norm", "relative_error", "l0", "latents")
_CHUNK = 256  # tokens to encode at a time: bounds the memory of the dense latents of a wide SAE


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A text and its tokens.

    Attributes:
        text: the text.
        ids: token ids, special tokens included.
        tokens: text of each token.
    """

    text: str
    ids: list[int]
    tokens: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRecord:
    """Numbers for each token of a text; tensors on the CPU, float32 unless another dtype is given.

    Attributes:
        norm: `(seq_length,)`, Euclidean norm of the raw activation.
        error: `(seq_length,)`, Euclidean norm of reconstruction minus activation; None without an SAE.
        l0: int64 `(seq_length,)`, number of latents above 0.
        values: `(seq_length, n)`, the largest activations of latents, largest first.
        latents: int64 `(seq_length, n)`, the numbers of these latents.
        columns: `(seq_length, m)`, activations of the latents `column_ids`, for a picture.
        column_ids: int64 `(m,)`, the latents with the largest activations over the text, where each token's activations
            are divided by its largest one; in the order of the tokens where they peak.
    """

    norm: Tensor
    error: Tensor | None = None
    l0: Tensor
    values: Tensor
    latents: Tensor
    columns: Tensor
    column_ids: Tensor

    @property
    def relative_error(self) -> Tensor | None:
        """`error / norm`, `(seq_length,)`; None without an SAE."""
        return None if self.error is None else self.error / self.norm

    def means(self) -> dict[str, float]:
        """Means over tokens, by the name under which loggers get them."""
        means = {"norm": float(self.norm.mean())}
        if self.error is not None and self.relative_error is not None:
            means |= {
                "relative_error": float(self.relative_error.mean()),
                "l0": float(self.l0.float().mean()),
            }
        return means


@dataclass(frozen=True, slots=True, kw_only=True)
class _ChunkRecord:
    """The numbers of a `SampleRecord` for some of the tokens, on the SAE's device.

    Attributes:
        shares: `(d_sae,)`, the sum over tokens of each latent's activation divided by the token's largest one.
    """

    norm: Tensor
    error: Tensor
    l0: Tensor
    values: Tensor
    latents: Tensor
    shares: Tensor


def record_sample(
    rows: Mapping[str, Tensor], sae: SaeView | None, n_latents: int, n_columns: int = 0
) -> SampleRecord:
    """Run an SAE on the raw activations of one text.

    Args:
        rows: raw `(seq_length, d_in)` by hook point. Norms and errors are of what the SAE reconstructs; the rows of
            several hook points are concatenated.
        sae: the SAE; None records norms only.
        n_latents: number of latents to keep for each token.
        n_columns: number of latents to show in a picture; 0 skips the extra `encode` for it.
    """
    if sae is None:
        norm = side_by_side(rows, list(rows)).norm(dim=1).cpu()
        empty, ids = torch.zeros(len(norm), 0), torch.zeros(len(norm), 0, dtype=torch.int64)
        return SampleRecord(
            norm=norm, l0=ids.sum(1), values=empty, latents=ids, columns=empty, column_ids=ids[0]
        )
    chunks = _chunks(rows)
    parts = [_record_chunk(chunk, sae, n_latents) for chunk in chunks]
    norm = torch.cat([part.norm for part in parts]).cpu()
    shares = torch.stack([part.shares for part in parts]).sum(0)
    column_ids = shares.topk(min(n_columns, len(shares))).indices
    column_ids = column_ids[shares[column_ids] > 0]
    columns = torch.zeros(len(norm), 0)
    if len(column_ids):
        columns = torch.cat([sae.encode(chunk)[:, column_ids].float().cpu() for chunk in chunks])
        order = columns.argmax(0).argsort(stable=True)  # in the order of the token where each peaks
        columns, column_ids = columns[:, order], column_ids.cpu()[order]
    return SampleRecord(
        norm=norm,
        error=torch.cat([part.error for part in parts]).cpu(),
        l0=torch.cat([part.l0 for part in parts]).cpu(),
        values=torch.cat([part.values for part in parts]).cpu().float(),
        latents=torch.cat([part.latents for part in parts]).cpu(),
        columns=columns,
        column_ids=column_ids.cpu(),
    )


def _chunks(rows: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    length = len(next(iter(rows.values())))
    starts = range(0, length, _CHUNK)
    return [{hook: x[start : start + _CHUNK] for hook, x in rows.items()} for start in starts]


def _record_chunk(rows: Mapping[str, Tensor], sae: SaeView, n_latents: int) -> _ChunkRecord:
    latents = sae.encode(rows)
    target = side_by_side(rows, sae.writes)
    error = (side_by_side(sae.reconstruct(rows), sae.writes) - target).norm(dim=1)
    values, ids = latents.topk(min(n_latents, latents.shape[1]), dim=1)
    # Relative to each token's largest activation: otherwise one token with a huge norm chooses all columns.
    shares = (latents.clamp(min=0) / values[:, :1].clamp(min=1e-12)).sum(0)
    return _ChunkRecord(
        norm=target.norm(dim=1),
        error=error,
        l0=(latents > 0).sum(1),
        values=values,
        latents=ids,
        shares=shares,
    )


def token_records(sample: Sample, record: SampleRecord, step: int, index: int) -> list[dict[str, Any]]:
    """The lines of `samples.jsonl`: one JSON object for each token, with the latents above 0.

    Args:
        sample: the text.
        record: its numbers.
        step: the Trainer's global step.
        index: number of the text, from 0.
    """
    relative = record.relative_error
    out = []
    for i, token in enumerate(sample.tokens):
        fired = record.values[i] > 0
        line: dict[str, Any] = {
            "step": step,
            "sample": index,
            "position": i,
            "token_id": sample.ids[i],
            "token": token,
            "norm": float(record.norm[i]),
        }
        if record.error is not None and relative is not None:
            line |= {
                "error": float(record.error[i]),
                "relative_error": float(relative[i]),
                "l0": int(record.l0[i]),
                "latents": record.latents[i][fired].tolist(),
                "values": record.values[i][fired].tolist(),
            }
        out.append(line)
    return out


def table_rows(lines: Sequence[Mapping[str, Any]]) -> list[list[Cell]]:
    """The objects of `token_records` as table rows with the columns `TABLE_COLUMNS`."""
    return [
        [
            line["position"],
            readable(line["token"]),
            line["norm"],
            line.get("relative_error"),
            line.get("l0"),
            ", ".join(
                f"{n}: {v:.3g}" for n, v in zip(line.get("latents", ()), line.get("values", ()), strict=True)
            ),
        ]
        for line in lines
    ]


def sample_picture(sample: Sample, record: SampleRecord, title: str) -> NDArray[np.uint8]:
    """Draw bars for each token beside a heatmap of tokens by latents: RGBA pixels `(height, width, 4)`."""
    metrics: dict[str, Tensor | NDArray[Any]] = {"norm": record.norm}
    if record.relative_error is not None:
        metrics |= {"relative error": record.relative_error, "L0": record.l0}
    figure = plot_sample(sample.tokens, metrics, record.columns, record.column_ids.tolist(), title)
    return figure_pixels(figure)
