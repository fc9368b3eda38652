"""Held-out metrics: exact sums over the whole validation set and all ranks, in constant memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


def fvu(error: Tensor, deviation: Tensor, energy: Tensor) -> Tensor:
    """Fraction of variance unexplained, also defined for rows that do not vary.

    Args:
        error: summed squared error.
        deviation: summed squared deviation of the rows from their mean.
        energy: summed square of the rows; a deviation below 1e-10 of it is rounding noise and counts as none.

    Returns:
        error / deviation; error / energy for constant rows; error itself for rows that are all zero.
    """
    floor = torch.where(energy > 0, energy, torch.ones_like(energy))
    return error / torch.where(deviation > 1e-10 * floor, deviation, floor)


class HeldOutMetrics(Metric):
    """Reconstruction quality and sparsity over held-out rows, summed over ranks by `compute`.

    It is not part of any state dict.

    Args:
        d_sae: number of latents.
        d_out: width of the rows that are reconstructed.
        device: where to keep the sums, which are float64 (float32 on MPS, which has no float64).

    Attributes:
        sums: `(6,)`: number of rows, summed squares of rows, of errors and of reconstructions, summed dot
            products of rows and reconstructions, summed cosines.
        row_sum: `(d_out,)`, sum of the rows.
        firings: int64 `(d_sae,)`, number of rows in which each latent was active.
    """

    full_state_update = False
    sums: Tensor
    row_sum: Tensor
    firings: Tensor

    def __init__(self, d_sae: int, d_out: int, device: torch.device) -> None:
        super().__init__()
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.add_state("sums", torch.zeros(6, dtype=dtype), dist_reduce_fx="sum")
        self.add_state("row_sum", torch.zeros(d_out, dtype=dtype), dist_reduce_fx="sum")
        self.add_state("firings", torch.zeros(d_sae, dtype=torch.int64), dist_reduce_fx="sum")
        self.to(device)

    @property
    def update_called(self) -> bool:
        """Always True: a rank without rows is valid, and torchmetrics would warn about it."""
        return True

    def update(self, rows: Tensor, reconstructions: Tensor, latents: Tensor) -> None:
        """Add rows and reconstructions `(batch, d_out)` and latents `(batch, d_sae)`."""
        x, x_hat = rows.to(self.sums.dtype), reconstructions.to(self.sums.dtype)
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
            ]
        )
        self.row_sum += x.sum(0)
        self.firings += (latents > 0).sum(0)

    def compute(self) -> dict[str, Tensor]:
        """Metrics as scalars over the rows of all ranks; empty if there were no rows.

        - `fvu`: summed squared error / summed squared deviation from the mean row.
        - `cosine`: mean cosine between a row and its reconstruction.
        - `l0`: mean number of active latents per row.
        - `dead_fraction`: share of latents that are active in no row.
        - `shrinkage`: the factor by which reconstructions are too short, 1 if they are unbiased
          (Rajamanoharan et al. 2024, arXiv 2404.16014, equation 10).
        - `rows`: number of rows.
        """
        rows, energy, error, energy_hat, dot, cosine = self.sums
        if rows == 0:
            return {}
        deviation = (energy - self.row_sum.square().sum() / rows).clamp(min=0)
        return {
            "fvu": fvu(error, deviation, energy),
            "cosine": cosine / rows,
            "l0": self.firings.sum().to(rows.dtype) / rows,
            "dead_fraction": 1 - (self.firings > 0).to(rows.dtype).mean(),
            "shrinkage": torch.where(dot > 0, energy_hat / dot.clamp(min=1e-30), torch.zeros_like(dot)),
            "rows": rows,
        }
