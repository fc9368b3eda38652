"""Initial weights from a seed, the geometric median of a batch, and norms of weight rows."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def generator(seed: int, *words: int) -> torch.Generator:
    """A new CPU generator, seeded with `(seed, *words)`; the global generator is not used."""
    state = np.random.SeedSequence((seed, *words)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) & (2**63 - 1))


def unit_rows(n: int, d: int, rng: torch.Generator) -> Tensor:
    """Float32 `(n, d)`: rows of norm 1, uniform on the sphere."""
    return F.normalize(torch.randn(n, d, generator=rng), dim=1)


def encoder_decoder(
    d_sae: int, d_read: int, d_write: int, seed: int, *, unit_norm: bool, tied: bool
) -> tuple[Tensor, Tensor]:
    """Initial `W_enc` `(d_sae, d_read)` and `W_dec` `(d_sae, d_write)` with random rows.

    Args:
        d_sae: number of latents.
        d_read: width of the rows that are encoded.
        d_write: width of the rows that are reconstructed.
        seed: seed of both.
        unit_norm: decoder rows of norm 1; else 0.1, as in Conerly et al. 2024.
        tied: start the encoder as a copy of the decoder; else with unit rows of its own.
    """
    rng = generator(seed)
    decoder = unit_rows(d_sae, d_write, rng)
    if not unit_norm:
        decoder *= 0.1
    return decoder.clone() if tied else unit_rows(d_sae, d_read, rng), decoder


def geometric_median(rows: Tensor, iterations: int = 50, tolerance: float = 1e-5) -> Tensor:
    """The point `(d,)` with the smallest sum of distances to rows `(n, d)`, by Weiszfeld's algorithm.

    Unlike the mean, it hardly moves with a few rows of very large norm. The median of equal rows is that row, the median
    of no rows is NaN.
    """
    point: Tensor = rows.mean(0)
    for _ in range(iterations):
        weights = 1 / torch.linalg.vector_norm(rows - point, dim=1).clamp(min=1e-8)
        moved: Tensor = weights @ rows / weights.sum()
        if torch.linalg.vector_norm(moved - point) <= tolerance * torch.linalg.vector_norm(point):
            return moved
        point = moved
    return point


def rms_norm(rows: Tensor) -> Tensor:
    """Root mean square of the norms of rows `(n, d)`: 1 where every row is zero, NaN where there is no row."""
    norm: Tensor = rows.square().sum(1).mean().sqrt()
    return torch.where(norm == 0, torch.ones_like(norm), norm)


@torch.no_grad()
def normalize_rows(weight: Tensor) -> None:
    """Scale the rows of weight `(n, d)` to norm 1, in place."""
    weight.div_(torch.linalg.vector_norm(weight, dim=1, keepdim=True).clamp(min=1e-12))


@torch.no_grad()
def remove_parallel(grad: Tensor, weight: Tensor) -> None:
    """Remove from grad `(n, d)` its component along the unit rows of weight `(n, d)`, in place.

    Otherwise Adam's momentum would change norms that `normalize_rows` then resets
    (Bricken et al. 2023; Gao et al. 2024, appendix A.3).
    """
    along = torch.linalg.vecdot(grad, weight)
    grad.addcmul_(weight, along[:, None], value=-1.0)
