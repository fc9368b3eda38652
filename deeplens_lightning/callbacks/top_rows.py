"""Keep the rows with the largest activations of chosen latents, merged batch by batch without waiting for the device.

In: raw rows, activations and provenance of one batch after another. Out: for each latent its top rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_EMPTY = float("-inf")  # value of a place that holds no row


@dataclass(frozen=True, slots=True, kw_only=True)
class TopRow:
    """One row on which a latent fires, and where the row came from.

    Attributes:
        latent: number of the latent.
        value: the latent's activation on the row, above 0.
        document_hash: 64-bit hash of the document's text.
        document_index: number of the document in its source.
        position: position of the token in the document.
        token_id: id of the token.
    """

    latent: int
    value: float
    document_hash: int
    document_index: int
    position: int
    token_id: int


class TopRows:
    """For each of `n` latents, the `keep` rows with its largest activations up to now.

    The raw rows are kept too (`n * keep` of them), so that `refresh` can compute their activations again with the
    present weights of the SAE. Rows with large activations early in training can then be replaced by later ones.

    Args:
        latents: numbers of the latents, int64 `(n,)`.
        keep: number of rows to keep for each latent.

    Attributes:
        values: activations, largest first, float32 `(n, keep)`; `-inf` where there is no row.
        provenance: int64 `(n, keep, 4)`: document hash, document index, position, token id.
        rows: raw rows `(n, keep, d_in)` by hook point.
        fired: number of rows on which each latent fired, int64 `(n,)`.
        seen: number of rows added.
    """

    def __init__(self, latents: Tensor, keep: int) -> None:
        n = len(latents)
        self.latents = latents
        self.values = torch.full((n, keep), _EMPTY, device=latents.device)
        self.provenance = torch.zeros(n, keep, 4, dtype=torch.int64, device=latents.device)
        self.rows: dict[str, Tensor] = {}
        self.fired = torch.zeros(n, dtype=torch.int64, device=latents.device)
        self.seen = 0

    def state(self) -> dict[str, Any]:
        """Numbers, and tensors on the CPU, for a checkpoint."""
        return {
            "latents": self.latents.cpu(),
            "values": self.values.cpu(),
            "provenance": self.provenance.cpu(),
            "rows": {name: x.cpu() for name, x in self.rows.items()},
            "fired": self.fired.cpu(),
            "seen": self.seen,
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any], device: torch.device) -> TopRows:
        """The rows of a `state`, on a device."""
        top = cls(state["latents"].to(device), keep=state["values"].shape[1])
        top.values, top.fired = state["values"].to(device), state["fired"].to(device)
        top.provenance, top.seen = state["provenance"].to(device), state["seen"]
        top.rows = {name: x.to(device) for name, x in state["rows"].items()}
        return top

    def watched(self, parts: Iterable[Tensor]) -> Tensor:
        """Activations of the watched latents alone, `(rows, n)`, from latents `(m, d_sae)` of parts of the rows."""
        return torch.cat([part[:, self.latents] for part in parts])

    def add(self, rows: Mapping[str, Tensor], activations: Tensor, provenance: Tensor) -> None:
        """Merge one batch.

        Args:
            rows: raw rows `(batch, d_in)` by hook point.
            activations: `(batch, n)`, of the latents in their order.
            provenance: int64 `(batch, 4)`: document hash, document index, position, token id.
        """
        n, keep = self.values.shape
        self.seen += len(activations)
        self.fired = self.fired + (activations > 0).sum(
            0
        )  # a new tensor: a checkpoint may be saved in a thread
        top, index = activations.float().topk(min(keep, len(activations)), dim=0)
        top, index = top.T, index.T  # (n, k)
        new = provenance.to(index.device, non_blocking=True)[index]  # (n, k, 4)
        # The columns of document hash and position: a slice, because a list of columns is copied to the device.
        same = (new[:, :, None, :3:2] == self.provenance[:, None, :, :3:2]).all(-1)
        # A later epoch serves the same rows again: those that are kept already do not count twice.
        known = (same & (self.values[:, None, :] > _EMPTY)).any(-1)
        top = torch.where((top > 0) & ~known, top, _EMPTY)
        values = torch.cat([self.values, top], dim=1)
        self.values, order = values.topk(keep, dim=1)
        self.provenance = _take(torch.cat([self.provenance, new], dim=1), order)
        for name, x in rows.items():
            held = self.rows.get(name)
            held = x.new_zeros(n, keep, x.shape[1]) if held is None else held
            self.rows[name] = _take(torch.cat([held, x[index]], dim=1), order)

    def refresh(self, encode_parts: Callable[[Mapping[str, Tensor]], Iterable[Tensor]]) -> None:
        """Compute the activations of the kept rows again and sort them; rows that no longer fire are removed.

        Args:
            encode_parts: from raw rows `(m, d_in)` by hook point to the latents `(..., d_sae)` of parts of them.
        """
        if not self.rows:
            return
        n, keep = self.values.shape
        watched = self.watched(encode_parts({name: x.flatten(0, 1) for name, x in self.rows.items()}))
        own = torch.arange(n, device=watched.device)
        now = watched.float().reshape(n, keep, n)[own, :, own]  # each row's activation of its own latent
        now = torch.where((self.values > _EMPTY) & (now > 0), now, _EMPTY)
        self.values, order = now.sort(dim=1, descending=True)
        self.provenance = _take(self.provenance, order)
        self.rows = {name: _take(x, order) for name, x in self.rows.items()}

    def firing(self) -> list[TopRow]:
        """The kept rows as plain numbers, latent by latent in the order of `latents`, largest activation first."""
        values, provenance = self.values.tolist(), self.provenance.tolist()
        return [
            TopRow(
                latent=latent,
                value=values[i][j],
                document_hash=place[0],
                document_index=place[1],
                position=place[2],
                token_id=place[3],
            )
            for i, latent in enumerate(self.latents.tolist())
            for j, place in enumerate(provenance[i])
            if values[i][j] > 0
        ]


def _take(x: Tensor, order: Tensor) -> Tensor:
    """`x[i, order[i, j]]` at `(i, j)`, for x `(n, m, ...)` and order `(n, k)`."""
    return x[torch.arange(len(x), device=x.device)[:, None], order]
