"""Sparse rows made from a known dictionary, and a data module that serves tensors."""

from __future__ import annotations

from collections.abc import Iterator

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from deeplens_lightning.activation_data import ActivationData
from deeplens_lightning.sae import Dictionary


def dictionary(n: int, d: int, seed: int = 0) -> Tensor:
    """Unit rows `(n, d)`."""
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def codes(rows: int, n: int, active: int, seed: int = 0) -> Tensor:
    """Non-negative codes `(rows, n)` with about `active` entries a row, each between 0.5 and 1.5."""
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(rows, n, generator=g) < active / n) * (0.5 + torch.rand(rows, n, generator=g))


def mean_max_cosine(true: Tensor, decoder: Tensor) -> float:
    """Mean over the rows of `true` of the largest cosine with a row of `decoder`."""
    return float((F.normalize(true, dim=1) @ F.normalize(decoder.detach(), dim=1).T).max(1).values.mean())


def train(sae: Dictionary, batches: Iterator, steps: int) -> None:
    """Train as Lightning's loop does, without its overhead."""
    sae.prepare(None)
    optimizer = torch.optim.Adam([sae.parameter_group()], fused=True)
    for i in range(steps):
        batch = next(batches)
        sae.initialize_from(batch)
        for group in optimizer.param_groups:
            group["lr"] = sae.lr * min(1.0, (i + 1) / 50, 5 * (steps - i) / steps)
        optimizer.zero_grad()
        sae.step(batch, i / steps).loss.backward()
        sae.prepare_gradients()
        optimizer.step()
        sae.project()


class Resumable:
    """A loader with a length that continues from a loaded state, as the data module's does."""

    def __init__(self, batches: list) -> None:
        self.batches, self.position = batches, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator:
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[self.position - 1]
        self.position = 0

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]


class Rows(ActivationData, L.LightningDataModule):
    """Serves fixed batches of tensors, or of dicts of them, normalised by `scaling`."""

    def __init__(self, train: list, val: list | None = None, scaling=None) -> None:
        super().__init__()
        self.train, self.val, self._scaling = train, val, scaling

    @property
    def scaling(self):
        return self._scaling

    def train_dataloader(self):
        return Resumable(self.train)

    def val_dataloader(self):
        return DataLoader(self.val or [], batch_size=None)
