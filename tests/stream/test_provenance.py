"""Provenance survives casts and moves: in every loop of a Trainer, in every precision, live and cached."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from deeplens_lightning.datamodule import ActivationDataModule
from deeplens_lightning.types import Provenance
from tests.support.training import data, trainer


class Asks(L.LightningModule):
    """A module that looks up the provenance of each batch in every loop.

    Attributes:
        found: stage, batch in float32 and provenance.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.found: list[tuple[str, Tensor, Provenance | None]] = []

    def look(self, stage: str, batch: Tensor) -> Tensor:
        self.found.append((stage, batch.float(), self.trainer.datamodule.provenance(batch)))  # type: ignore[attr-defined]
        return (batch.mean() * self.weight).sum()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.look("train", batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.look("val", batch)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.look("test", batch)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.look("predict", batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Moved(ActivationDataModule):
    """Batches are copied on their way, as to an accelerator."""

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch.clone()


class Doubling(Asks):
    """A module with transfer hooks of its own."""

    def on_before_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
        return batch * 2

    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
        return batch + 1


def rows_by_place(lm: str) -> dict[tuple[int, int], Tensor]:
    """Every row of the training and validation split, by document hash and position."""
    dm = data(lm)
    dm.setup("fit")
    found: dict[tuple[int, int], Tensor] = {}
    for loader in (dm.train_dataloader(), dm.val_dataloader()):
        for batch in loader:
            where = dm.provenance(batch)
            assert where is not None
            found |= zip(
                zip(where.document_hash.tolist(), where.position.tolist(), strict=True), batch, strict=True
            )
    dm.teardown("fit")
    return found


def check(found: list[tuple[str, Tensor, Provenance | None]], rows: dict[tuple[int, int], Tensor]) -> None:
    assert {stage for stage, *_ in found} == {"train", "val", "test", "predict"}
    for stage, batch, where in found:
        assert where is not None, f"no provenance in {stage}"
        places = zip(where.document_hash.tolist(), where.position.tolist(), strict=True)
        expected = torch.stack([rows[place] for place in places])
        torch.testing.assert_close(batch, expected, rtol=2e-2, atol=2e-2)


def run_all_loops(module: Asks, dm: ActivationDataModule, folder: Path, **changes: Any) -> None:
    run = trainer(folder, max_steps=5, val_check_interval=3, check_val_every_n_epoch=None, **changes)
    run.fit(module, dm)
    run.test(module, dm, verbose=False)
    run.predict(module, dm, return_predictions=False)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "16-true", "64-true", "bf16-mixed"])
@pytest.mark.parametrize("kind", [ActivationDataModule, Moved])
def test_every_loop_has_the_provenance_of_its_batch(
    kind: type[ActivationDataModule], precision: str, tiny: Callable[[str], str], tmp_path: Path
) -> None:
    lm, module = tiny("gpt2"), Asks()
    run_all_loops(module, data(lm, kind=kind), tmp_path, precision=precision)
    check(module.found, rows_by_place(lm))


def test_cached_rows_keep_their_provenance_when_they_are_moved(
    tiny: Callable[[str], str], tmp_path: Path
) -> None:
    lm, cache = tiny("gpt2"), str(tmp_path / "cache")
    dm = data(lm, write_shards=cache)
    dm.setup("fit")
    list(dm.train_dataloader())
    dm.teardown("fit")
    module = Asks()
    reading = Moved(shards=cache, batch_size=16, val_fraction=0.2, val_rows=64)
    run_all_loops(module, reading, tmp_path, precision="bf16-true")
    check(module.found, rows_by_place(lm))


@pytest.mark.filterwarnings(
    "ignore:You have overridden `on_(before|after)_batch_transfer` in both:UserWarning"
)
def test_the_modules_own_transfer_hooks_still_run(tiny: Callable[[str], str], tmp_path: Path) -> None:
    lm, module = tiny("gpt2"), Doubling()
    run_all_loops(module, data(lm), tmp_path)
    check([(stage, (batch - 1) / 2, where) for stage, batch, where in module.found], rows_by_place(lm))


def test_a_module_that_writes_into_its_batch_leaves_the_validation_set_as_it_is(
    tiny: Callable[[str], str],
) -> None:
    dm = data(tiny("gpt2"))
    dm.setup("fit")
    first = [batch.clone() for batch in dm.val_dataloader()]
    for batch in dm.val_dataloader():
        batch.zero_()
    second = list(dm.val_dataloader())
    dm.teardown("fit")
    assert first
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
