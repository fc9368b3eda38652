"""Active latents of batches, for `trainer.predict`: sparse records with the provenance of their rows.

In: a dictionary and batches as the data module serves them. Out: one `SparseLatents` for each batch, on the CPU. The
dense latents of a whole batch never exist.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deeplens_lightning.sae import forward as passes
from deeplens_lightning.sae.dictionary import Dictionary
from deeplens_lightning.types import Batch, Provenance


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseLatents:
    """The active latents of one batch of rows, sorted by row and then by latent.

    Attributes:
        rows: int32 `(n,)`, number of the row in the batch.
        latents: int32 `(n,)`, number of the latent.
        values: `(n,)`, value of the latent in this row, above 0, in the dtype of the SAE.
        shape: number of rows in the batch, and number of latents of the SAE. A row need not have an active latent.
        provenance: document, position and token id of each row of the batch, `(batch,)`; None if unknown.
    """

    rows: Tensor
    latents: Tensor
    values: Tensor
    shape: tuple[int, int]
    provenance: Provenance | None

    def to(self, device: torch.device | str) -> SparseLatents:
        """The same with the active latents on a device; Lightning calls this for what `predict_step` returns."""
        rows, latents, values = (x.to(device) for x in (self.rows, self.latents, self.values))
        return replace(self, rows=rows, latents=latents, values=values)

    def dense(self) -> Tensor:
        """All latents, `(batch, d_sae)`."""
        found = self.values.new_zeros(self.shape)
        found[self.rows.long(), self.latents.long()] = self.values
        return found


@torch.no_grad()
def active_latents(
    sae: Dictionary, batch: Batch, provenance: Provenance | None
) -> tuple[SparseLatents, Tensor]:
    """Encode a batch as the data module serves it, a few rows at a time.

    Args:
        sae: the dictionary.
        batch: the batch.
        provenance: the provenance of its rows; None if unknown.

    Returns:
        The active latents, on the CPU; and bool `(batch,)`, which rows hold NaN or infinity and have therefore none.
    """
    x, _ = sae.rows(batch)
    bad = ~x.isfinite().all(1)
    finite = x.masked_fill(bad[:, None], 0)
    rows, latents, values = passes.active_entries(finite, sae.weights, sae.activation)
    keep = ~bad[rows]
    found = SparseLatents(
        rows=rows[keep].int().cpu(),
        latents=latents[keep].int().cpu(),
        values=values[keep].cpu(),
        shape=(len(x), sae.d_sae),
        provenance=provenance,
    )
    return found, bad
