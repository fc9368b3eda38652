"""Starting points: seeded unit-norm dictionaries and the geometric median of the first batch."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def generator(seed: int, *words: int) -> torch.Generator:
    """A CPU generator of its own for `(seed, *words)`; the process's global one is left alone."""
    state = np.random.SeedSequence((seed, *words)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) & (2**63 - 1))


def unit_rows(n: int, d: int, rng: torch.Generator) -> Tensor:
    """Float32 `(n, d)`: rows of norm 1, uniform on the sphere."""
    return F.normalize(torch.randn(n, d, generator=rng), dim=1)


def geometric_median(rows: Tensor, iterations: int = 50, tolerance: float = 1e-5) -> Tensor:
    """The point `(d,)` with the least summed distance to rows `(n, d)`, by Weiszfeld's algorithm.

    Unlike the mean it ignores a few enormous rows. Constant rows give themselves.
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
    """Root mean square of the norms of rows `(n, d)`, 1 where every row is zero."""
    norm: Tensor = rows.square().sum(1).mean().sqrt()
    return torch.where(norm > 0, norm, torch.ones_like(norm))


@torch.no_grad()
def normalize_rows(weight: Tensor) -> None:
    """Bring the rows of weight `(n, d)` to norm 1, in place."""
    weight.div_(torch.linalg.vector_norm(weight, dim=1, keepdim=True).clamp(min=1e-12))


@torch.no_grad()
def remove_parallel(grad: Tensor, weight: Tensor) -> None:
    """Take from grad `(n, d)` the part along the unit rows of weight, in place.

    Otherwise Adam's momentum pushes along a direction that the normalisation then undoes
    (Bricken et al. 2023; Gao et al. 2024, appendix A.3).
    """
    along = torch.linalg.vecdot(grad, weight)
    grad.addcmul_(weight, along[:, None], value=-1.0)
