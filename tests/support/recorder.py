"""Record training batches with the provenance of their rows, from a Trainer or from a plain loop; compare them."""

from __future__ import annotations

from itertools import islice
from typing import Any

import lightning as L
import torch
from torch import Tensor

from deeplens_lightning.datamodule import ActivationDataModule


class Recorder(L.Callback):
    """Store every training batch, the provenance of its rows, and its loss.

    Attributes:
        batches: pairs of a batch and its provenance, int64 `(batch, 4)`.
        losses: one a batch.
    """

    def __init__(self) -> None:
        self.batches: list[tuple[Any, Tensor]] = []
        self.losses: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        copy = {k: v.clone() for k, v in batch.items()} if isinstance(batch, dict) else batch.clone()
        self.batches.append((copy, provenance(trainer.datamodule, batch)))

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if outputs:  # with manual optimization there are none
            self.losses.append(float(outputs["loss"]))


def provenance(datamodule: ActivationDataModule, batch: Any) -> Tensor:
    """Document hash, document index, position and token id of each row: int64 `(batch, 4)`."""
    found = datamodule.provenance(batch)
    assert found is not None
    return found.stacked()


def take(datamodule: ActivationDataModule, count: int) -> list[tuple[Any, Tensor]]:
    """The next `count` batches with their provenance, without a Trainer; over several epochs if necessary."""
    found: list[tuple[Any, Tensor]] = []
    while len(found) < count:
        batches = islice(datamodule.train_dataloader(), count - len(found))
        found.extend((batch, provenance(datamodule, batch)) for batch in batches)
    return found


def same(a: Any, b: Any) -> bool:
    """Whether two batches are equal bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    return torch.equal(a, b)


def assert_same(found: list[tuple[Any, Tensor]], expected: list[tuple[Any, Tensor]]) -> None:
    """Check that both lists hold the same batches of the same rows in the same order."""
    assert len(found) == len(expected)
    wrong = [
        i
        for i, (a, b) in enumerate(zip(found, expected, strict=True))
        if not (same(a[0], b[0]) and torch.equal(a[1], b[1]))
    ]
    assert not wrong, f"batches {wrong} differ"
