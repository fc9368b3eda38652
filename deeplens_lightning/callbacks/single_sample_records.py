"""One look at one text through an SAE: numbers per token, as records, as a table, as a picture.

In: raw activations `(seq_length, d_in)` and an SAE. Out: what `ExtractSingleSample` writes.
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
_CHUNK = 256  # tokens encoded at a time, which bounds the dense latents of a wide SAE


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A text as the model reads it."""

    text: str
    ids: list[int]
    tokens: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What one look saw; tensors on the CPU, float32 where not said otherwise.

    Attributes:
        norm: `(seq_length,)` Euclidean norm of the raw activation.
        error: `(seq_length,)` norm of what the reconstruction misses; None without an SAE.
        l0: `(seq_length,)` int64, latents above 0.
        values: `(seq_length, n)` the strongest latents' activations, strongest first.
        latents: `(seq_length, n)` int64, their numbers.
        columns: `(seq_length, m)` activations of the latents in `column_ids`, for a picture.
        column_ids: int64 `(m,)` the latents that matter most on this text, by their share of each token's
            strongest activation.
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
        """`error / norm` per token."""
        return None if self.error is None else self.error / self.norm

    def means(self) -> dict[str, float]:
        """Means over tokens, for loggers."""
        means = {"norm": float(self.norm.mean())}
        if self.error is not None and self.relative_error is not None:
            means |= {
                "relative_error": float(self.relative_error.mean()),
                "l0": float(self.l0.float().mean()),
            }
        return means


def look_at(rows: Mapping[str, Tensor], sae: SaeView | None, n_latents: int, n_columns: int = 0) -> Look:
    """Run an SAE on one text's raw activations.

    Args:
        rows: raw `(seq_length, d_in)` by hook point. Norms and errors are those of what the SAE
            reconstructs; several hook points count side by side.
        sae: None where only norms are to be had.
        n_latents: strongest latents kept per token.
        n_columns: how many latents a picture shows; 0 spares their cost.
    """
    if sae is None:
        norm = side_by_side(rows, list(rows)).norm(dim=1).cpu()
        empty, ids = torch.zeros(len(norm), 0), torch.zeros(len(norm), 0, dtype=torch.int64)
        return Look(norm=norm, l0=ids.sum(1), values=empty, latents=ids, columns=empty, column_ids=ids[0])
    chunks = _chunks(rows)
    parts = [_look_at_chunk(chunk, sae, n_latents) for chunk in chunks]
    norm, error, l0, values, latents = (torch.cat([part[i] for part in parts]).cpu() for i in range(5))
    shares = torch.stack([part[5] for part in parts]).sum(0)
    column_ids = shares.topk(min(n_columns, len(shares))).indices
    column_ids = column_ids[shares[column_ids] > 0]
    columns = torch.zeros(len(norm), 0)
    if len(column_ids):
        columns = torch.cat([sae.encode(chunk)[:, column_ids].float().cpu() for chunk in chunks])
        order = columns.argmax(0).argsort(stable=True)  # in the order of the token where each peaks
        columns, column_ids = columns[:, order], column_ids.cpu()[order]
    return Look(
        norm=norm,
        error=error,
        l0=l0,
        values=values.float(),
        latents=latents,
        columns=columns,
        column_ids=column_ids.cpu(),
    )


def _chunks(rows: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    length = len(next(iter(rows.values())))
    starts = range(0, length, _CHUNK)
    return [{hook: x[start : start + _CHUNK] for hook, x in rows.items()} for start in starts]


def _look_at_chunk(rows: Mapping[str, Tensor], sae: SaeView, n_latents: int) -> tuple[Tensor, ...]:
    latents = sae.encode(rows)
    target = side_by_side(rows, sae.writes)
    error = (side_by_side(sae.reconstruct(rows), sae.writes) - target).norm(dim=1)
    values, ids = latents.topk(min(n_latents, latents.shape[1]), dim=1)
    # Of each token's strongest activation: else one token of a huge norm decides what all are shown by.
    shares = (latents.clamp(min=0) / values[:, :1].clamp(min=1e-12)).sum(0)
    return target.norm(dim=1), error, (latents > 0).sum(1), values, ids, shares


def records(sample: Sample, look: Look, step: int, index: int) -> list[dict[str, Any]]:
    """One JSON-able object per token; latents that do not fire are left out."""
    relative = look.relative_error
    out = []
    for i, token in enumerate(sample.tokens):
        fired = look.values[i] > 0
        record: dict[str, Any] = {
            "step": step,
            "sample": index,
            "position": i,
            "token_id": sample.ids[i],
            "token": token,
            "norm": float(look.norm[i]),
        }
        if look.error is not None and relative is not None:
            record |= {
                "error": float(look.error[i]),
                "relative_error": float(relative[i]),
                "l0": int(look.l0[i]),
                "latents": look.latents[i][fired].tolist(),
                "values": look.values[i][fired].tolist(),
            }
        out.append(record)
    return out


def table(rows: Sequence[Mapping[str, Any]]) -> list[list[Cell]]:
    """`records` as cells under `TABLE_COLUMNS`."""
    return [
        [
            row["position"],
            readable(row["token"]),
            row["norm"],
            row.get("relative_error"),
            row.get("l0"),
            ", ".join(
                f"{n}: {v:.3g}" for n, v in zip(row.get("latents", ()), row.get("values", ()), strict=True)
            ),
        ]
        for row in rows
    ]


def picture(sample: Sample, look: Look, title: str) -> NDArray[np.uint8]:
    """Bars per token and tokens × top latents: `(height, width, 4)` uint8."""
    metrics: dict[str, Tensor | NDArray[Any]] = {"norm": look.norm}
    if look.relative_error is not None:
        metrics |= {"relative error": look.relative_error, "L0": look.l0}
    return figure_pixels(plot_sample(sample.tokens, metrics, look.columns, look.column_ids.tolist(), title))
