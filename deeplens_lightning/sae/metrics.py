"""Held-out metrics: exact sums over the whole validation set and over ranks, in constant memory."""

from __future__ import annotations

import torch
from torch import Tensor

from deeplens_lightning.distributed import max_over_ranks, sum_over_ranks


def fvu(error: Tensor, deviation: Tensor, energy: Tensor) -> Tensor:
    """Fraction of variance unexplained, defined for rows that do not vary.

    Args:
        error: summed squared error.
        deviation: summed squared deviation of the rows from their mean.
        energy: summed square of the rows, in whose rounding noise a deviation counts as none.

    Returns:
        error / deviation; error / energy for constant rows; error itself for all-zero rows.
    """
    floor = torch.where(energy > 0, energy, torch.ones_like(energy))
    return error / torch.where(deviation > 1e-10 * floor, deviation, floor)


class HeldOutMetrics:
    """Sums over held-out rows.

    Args:
        d_sae: latents.
        d_out: width of the rows that are reconstructed.
        device: where to keep the sums; float64 except on MPS, which has none.
    """

    def __init__(self, d_sae: int, d_out: int, device: torch.device) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(7, dtype=dtype, device=device)
        self.row_sum = torch.zeros(d_out, dtype=dtype, device=device)
        self.fired = torch.zeros(d_sae, dtype=torch.bool, device=device)

    def update(self, rows: Tensor, reconstructions: Tensor, latents: Tensor) -> None:
        """Add rows and reconstructions `(batch, d_out)` and latents `(batch, d_sae)`."""
        x, x_hat = rows.to(self.sums.dtype), reconstructions.to(self.sums.dtype)
        firing = latents > 0
        dot = (x * x_hat).sum(1)
        norms = torch.linalg.vector_norm(x, dim=1) * torch.linalg.vector_norm(x_hat, dim=1)
        self.sums += torch.stack(
            [
                self.sums.new_tensor(len(x)),
                x.square().sum(),
                (x - x_hat).square().sum(),
                x_hat.square().sum(),
                dot.sum(),
                (dot / norms.clamp(min=1e-30)).sum(),
                firing.sum().to(self.sums.dtype),
            ]
        )
        self.row_sum += x.sum(0)
        self.fired |= firing.any(0)

    def compute(self) -> dict[str, Tensor]:
        """Scalars over all ranks' rows; empty when there were none.

        - `fvu`: summed squared error / summed squared deviation from the mean row.
        - `cosine`: mean cosine between a row and its reconstruction.
        - `l0`: mean number of active latents.
        - `dead_fraction`: latents active in none of the `rows` rows.
        - `shrinkage`: the factor by which reconstructions are too short, 1 when unbiased
          (Rajamanoharan et al. 2024, arXiv 2404.16014, equation 10).
        """
        sums, row_sum, fired = (
            sum_over_ranks(self.sums),
            sum_over_ranks(self.row_sum),
            max_over_ranks(self.fired),
        )
        rows, energy, error, energy_hat, dot, cosine, active = sums
        if rows == 0:
            return {}
        deviation = (energy - row_sum.square().sum() / rows).clamp(min=0)
        return {
            "fvu": fvu(error, deviation, energy),
            "cosine": cosine / rows,
            "l0": active / rows,
            "dead_fraction": 1 - fired.to(sums.dtype).mean(),
            "shrinkage": torch.where(dot > 0, energy_hat / dot.clamp(min=1e-30), torch.zeros_like(dot)),
            "rows": rows,
        }
