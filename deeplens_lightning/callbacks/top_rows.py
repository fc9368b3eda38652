"""The strongest rows of some latents seen so far: a few tensors, merged batch by batch without a sync."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

_EMPTY = float("-inf")


class Strongest:
    """For each of `n` latents, the `keep` rows on which it was strongest, with their provenance.

    The activations themselves are kept too (`n * keep` of them), so that the values can be taken again
    from an SAE that has learned since: what was strong for an early SAE does not stay in the way.

    Args:
        latents: int64 `(n,)`.
        keep: rows per latent.
    """

    def __init__(self, latents: Tensor, keep: int) -> None:
        n = len(latents)
        self.latents = latents
        self.values = torch.full((n, keep), _EMPTY, device=latents.device)
        self.provenance = torch.zeros(n, keep, 4, dtype=torch.int64, device=latents.device)
        self.rows: dict[str, Tensor] = {}
        self.fired = torch.zeros(n, dtype=torch.int64, device=latents.device)
        self.seen = 0

    def add(self, rows: Mapping[str, Tensor], activations: Tensor, provenance: Tensor) -> None:
        """Merge a batch.

        Args:
            rows: raw `(batch, d_in)` by hook point.
            activations: `(batch, n)` of the latents watched.
            provenance: int64 `(batch, 4)`: document hash, document index, position, token id.
        """
        n, keep = self.values.shape
        self.seen += len(activations)
        self.fired += (activations > 0).sum(0)
        top, index = activations.float().topk(min(keep, len(activations)), dim=0)
        top, index = top.T, index.T  # (n, k)
        new = provenance.to(index.device, non_blocking=True)[index]  # (n, k, 4)
        same = (new[:, :, None, [0, 2]] == self.provenance[:, None, :, [0, 2]]).all(-1)
        known = (same & (self.values[:, None, :] > _EMPTY)).any(-1)  # the next epoch serves it again
        top = torch.where((top > 0) & ~known, top, _EMPTY)
        values = torch.cat([self.values, top], dim=1)
        self.values, order = values.topk(keep, dim=1)
        self.provenance = _take(torch.cat([self.provenance, new], dim=1), order)
        for name, x in rows.items():
            held = self.rows.get(name)
            held = x.new_zeros(n, keep, x.shape[1]) if held is None else held
            self.rows[name] = _take(torch.cat([held, x[index]], dim=1), order)

    def refresh(self, encode: Callable[[Mapping[str, Tensor]], Tensor]) -> None:
        """Take every value again from `encode`, raw rows by hook point to latents, and sort anew."""
        if not self.rows:
            return
        n, keep = self.values.shape
        latents = encode({name: x.flatten(0, 1) for name, x in self.rows.items()})
        column = self.latents[:, None].expand(n, keep).reshape(-1, 1)
        now = latents.float().gather(1, column).reshape(n, keep)
        now = torch.where((self.values > _EMPTY) & (now > 0), now, _EMPTY)
        self.values, order = now.sort(dim=1, descending=True)
        self.provenance = _take(self.provenance, order)
        self.rows = {name: _take(x, order) for name, x in self.rows.items()}


def _take(x: Tensor, order: Tensor) -> Tensor:
    """`x[i, order[i, j]]` for x `(n, m, ...)` and order `(n, k)`."""
    return x[torch.arange(len(x), device=x.device)[:, None], order]
