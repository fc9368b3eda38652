"""Held-out metrics of raw activations: exact sums over the whole set and all ranks, in constant memory.

In: rows and reconstructions in a dictionary's units. Out: the figures that `docs/pages/metrics.md` defines, which do not
depend on batches, ranks or the normalisation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics import Metric

from deeplens_lightning.sae.nonfinite import NonFiniteRows

HAVE_FLOAT64 = ("cpu", "cuda")
"""Types of devices that surely have float64; MPS and some XPU devices do not."""


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

    It is not part of any state dict. Rows of several hook points are joined to one row each.

    Args:
        d_sae: number of latents.
        d_out: width of the rows that are reconstructed.
        device: where to keep the sums: in float64 on the CPU and CUDA, elsewhere in float32 with their rounding errors.
        to_raw: converts rows `(batch, d_out)` from the units of `update` to raw activations; default leaves them.

    Attributes:
        sums: `(2, 6 + d_out)`, sums and the rounding errors of these sums: number of rows, summed squares of raw rows,
            of errors and of reconstructions, summed dot products of rows and reconstructions, summed cosines, sum of
            the rows.
        firings: int64 `(d_sae,)`, number of rows in which each latent was active.
        skipped: int64 scalar, number of rows with NaN or infinity, which are in no other sum.
        nonfinite: the first of these rows.
    """

    full_state_update = False
    sums: Tensor
    firings: Tensor
    skipped: Tensor

    def __init__(
        self,
        d_sae: int,
        d_out: int,
        device: torch.device,
        to_raw: Callable[[Tensor], Tensor] = lambda rows: rows,
    ) -> None:
        super().__init__()
        self._to_raw = to_raw
        dtype = torch.float64 if device.type in HAVE_FLOAT64 else torch.float32
        self.add_state("sums", torch.zeros(2, 6 + d_out, dtype=dtype), dist_reduce_fx="sum")
        self.add_state("firings", torch.zeros(d_sae, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("skipped", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.nonfinite = NonFiniteRows("held-out rows")
        self.to(device)

    @property
    def update_called(self) -> bool:
        """Always True: a rank without rows is valid, and torchmetrics would warn about it."""
        return True

    def update(
        self, rows: Tensor, reconstructions: Tensor, latents: Tensor, bad: Tensor | None = None
    ) -> None:
        """Add rows and their reconstructions.

        Args:
            rows: `(batch, d_out)`.
            reconstructions: `(batch, d_out)`.
            latents: `(batch, d_sae)`.
            bad: bool `(batch,)`, rows with NaN or infinity, which are left out and counted; None for no row.
        """
        x, x_hat = (self._to_raw(each.to(self.sums.dtype)) for each in (rows, reconstructions))
        active = latents > 0
        count = torch.full((), len(x), dtype=torch.int64, device=x.device)
        if bad is not None:
            x, x_hat = x.masked_fill(bad[:, None], 0), x_hat.masked_fill(bad[:, None], 0)
            active &= ~bad[:, None]
            self.skipped += bad.sum()
            count -= bad.sum()
        dot = (x * x_hat).sum(1)
        norms = torch.linalg.vector_norm(x, dim=1) * torch.linalg.vector_norm(x_hat, dim=1)
        totals = [
            count.to(x.dtype),
            x.square().sum(),
            (x - x_hat).square().sum(),
            x_hat.square().sum(),
            dot.sum(),
            (dot / norms.clamp(min=1e-30)).sum(),
        ]
        _add(self.sums, torch.cat([torch.stack(totals), x.sum(0)]))
        self.firings += active.sum(0)

    def compute(self) -> dict[str, Tensor]:
        """Metrics as scalars on the CPU over the rows of all ranks; empty if there were no rows.

        With raw rows x, their reconstructions x' and the mean m of the rows of the whole set:

        - `fvu`: sum of |x - x'|^2 / sum of |x - m|^2; explained variance is 1 - `fvu`.
        - `mse`: mean of |x - x'|^2, summed over the elements of a row.
        - `cosine`: mean cosine between a row and its reconstruction.
        - `l0`: mean number of active latents per row.
        - `dead_fraction`: share of latents that are active in no row.
        - `shrinkage`: the factor by which reconstructions are too short, 1 if they are unbiased
          (Rajamanoharan et al. 2024, arXiv 2404.16014, equation 10).
        - `rows`: number of rows in these figures.
        - `nonfinite_rows`: number of rows with NaN or infinity, which were left out; alone if there was no other row.
        """
        totals, firings, skipped = self.sums.cpu().double().sum(0), self.firings.cpu(), self.skipped.cpu()
        rows, energy, error, energy_hat, dot, cosine = totals[:6]
        if rows == 0:
            return {"nonfinite_rows": skipped} if skipped else {}
        deviation = (energy - totals[6:].square().sum() / rows).clamp(min=0)
        return {
            "fvu": fvu(error, deviation, energy),
            "mse": error / rows,
            "cosine": cosine / rows,
            "l0": firings.sum().double() / rows,
            "dead_fraction": 1 - (firings > 0).double().mean(),
            "shrinkage": torch.where(dot > 0, energy_hat / dot.clamp(min=1e-30), torch.zeros_like(dot)),
            "rows": rows,
            "nonfinite_rows": skipped,
        }


def _add(sums: Tensor, values: Tensor) -> None:
    """Add values `(n,)` to `sums[0]`, and the rounding errors of this to `sums[1]`, in place (Knuth's TwoSum)."""
    before = sums[0].clone()
    after = before + values
    added = after - before
    sums[1] += (before - (after - added)) + (values - added)
    sums[0].copy_(after)
