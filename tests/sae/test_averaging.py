"""Lightning's weight averaging: averages are valid dictionaries, and a resume equals a run that never stopped."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import Tensor
from transformers import PreTrainedModel

from deeplens_lightning.callbacks import LossRecovered
from deeplens_lightning.datamodule import ActivationDataModule
from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.sae import SparseAutoencoder
from deeplens_lightning.sae.grid import SparseAutoencoderGrid
from deeplens_lightning.sae.training import DictionaryTraining
from deeplens_lightning.shards import verify
from deeplens_lightning.stream.loader import ActivationLoader
from deeplens_lightning.stream.validation_set import RowsLoader
from tests.support.texts import texts
from tests.support.training import data, trainer

SETTINGS: dict[str, Any] = {"d_sae": 64, "k": 4, "lr": 3e-3, "dead_after_tokens": 200}


@pytest.fixture(scope="module")
def dm(tiny: Any) -> ActivationDataModule:
    """50 steps are 5 epochs of 10 batches of 16 rows; rows are normalised."""
    return data(tiny("gpt2"), max_tokens=160, normalize="zscore")


def one(d_in: Any, **changes: Any) -> SparseAutoencoder:
    return SparseAutoencoder(d_in, **(SETTINGS | changes))


def grid(d_in: Any, **changes: Any) -> SparseAutoencoderGrid:
    return SparseAutoencoderGrid(d_in, {"architecture": ["batch_topk", "jumprelu"]}, SETTINGS | changes)


class Figures(L.Callback):
    """Held-out figures by global step."""

    def __init__(self) -> None:
        self.found: dict[int, dict[str, float]] = {}

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        metrics = trainer.callback_metrics
        self.found[trainer.global_step] = {k: float(v) for k, v in metrics.items() if k.startswith("val/")}


def fit(
    folder: Path,
    module: DictionaryTraining,
    dm: ActivationDataModule,
    averaging: L.Callback,
    *callbacks: L.Callback,
    **options: Any,
) -> dict[int, dict[str, float]]:
    figures = Figures()
    path = options.pop("ckpt_path", None)
    settings: dict[str, Any] = {"max_epochs": 5, "val_check_interval": 5}
    run = trainer(folder, None, [averaging, figures, *callbacks], **(settings | options))
    run.fit(module, dm, ckpt_path=path)
    return figures.found


SAVE: dict[str, dict[str, Any]] = {
    "inside an epoch": {"every_n_train_steps": 9},
    "after validation": {},
    "at the end of an epoch": {"save_on_train_epoch_end": True},
}


def assert_valid(module: DictionaryTraining, tokens: int) -> None:
    for sae in module.dictionaries.values():
        assert int(sae.activity.tokens_seen) == tokens
        if sae.activation.unit_norm:
            torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64), rtol=0, atol=1e-6)


AVERAGING: dict[str, Callable[[], L.Callback]] = {
    "ema": lambda: EMAWeightAveraging(decay=0.9),
    "ema without buffers": lambda: EMAWeightAveraging(decay=0.9, use_buffers=False),
    "ema sometimes": lambda: EMAWeightAveraging(decay=0.9, update_every_n_steps=4, update_starting_at_step=7),
    "ema of epochs": lambda: EMAWeightAveraging(
        decay=0.5, update_every_n_steps=0, update_starting_at_epoch=1
    ),
    "mean": WeightAveraging,
    "swa": lambda: StochasticWeightAveraging(2e-3, swa_epoch_start=1, annealing_epochs=2),
}


slow = pytest.mark.slow
QUICK = (
    ("ema", one, "inside an epoch"),
    ("swa", one, "after validation"),
)


@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch:UserWarning")
@pytest.mark.parametrize(
    ("name", "make", "save"),
    [
        pytest.param(
            name,
            make,
            save,
            id=f"{name}-{make.__name__}-{save}",
            marks=() if (name, make, save) in QUICK else slow,
        )
        for name in AVERAGING
        for make in (one, grid)
        for save in SAVE
    ],
)
def test_averages_are_valid_dictionaries_and_resume_bit_for_bit(
    name: str,
    make: Callable[..., DictionaryTraining],
    save: str,
    dm: ActivationDataModule,
    tmp_path: Path,
) -> None:
    whole = make(dm.d_in)
    keep = ModelCheckpoint(tmp_path / "kept", "{step}", save_top_k=-1, **SAVE[save])
    figures = fit(tmp_path, whole, dm, AVERAGING[name](), keep)
    assert_valid(whole, 50 * 16)
    assert len(figures) == 10
    paths = sorted((tmp_path / "kept").glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    for path in (paths[len(paths) // 2],):
        again = make(dm.d_in, seed=9)
        resumed = fit(tmp_path, again, dm, AVERAGING[name](), ckpt_path=str(path))
        for key, value in whole.state_dict().items():
            assert torch.equal(value, again.state_dict()[key]), (path.name, key)
        assert resumed == {step: found for step, found in figures.items() if step in resumed}, path.name
        assert 50 in resumed


@pytest.mark.slow
def test_saved_and_validated_averages_are_on_the_unit_sphere(
    dm: ActivationDataModule, tmp_path: Path
) -> None:
    norms: list[Tensor] = []

    class Norms(L.Callback):
        def on_validation_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            norms.append(pl_module.W_dec.norm(dim=1))

    keep = ModelCheckpoint(tmp_path / "kept", "{step}", every_n_train_steps=9, save_top_k=-1)
    module = one(dm.d_in)
    fit(tmp_path, module, dm, EMAWeightAveraging(decay=0.9), keep, Norms())
    for path in (tmp_path / "kept").glob("*.ckpt"):
        saved = SparseAutoencoder.load_from_checkpoint(path, weights_only=True)
        assert int(saved.activity.tokens_seen) == 16 * int(path.stem.split("=")[1])
        norms.append(saved.W_dec.norm(dim=1))
    assert len(norms) == 10 * 4 + 5
    for found in norms:
        torch.testing.assert_close(found, torch.ones(64), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_checkpoint_of_an_exception_inside_validation_keeps_average_and_weights_apart(
    dm: ActivationDataModule, tmp_path: Path
) -> None:
    class Fails(L.Callback):
        def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 25:
                raise RuntimeError("raised by the test")

    whole, again = one(dm.d_in), one(dm.d_in, seed=9)
    figures = fit(tmp_path, whole, dm, EMAWeightAveraging(decay=0.9))
    with pytest.raises(RuntimeError, match="raised by the test"):
        fit(
            tmp_path,
            one(dm.d_in),
            dm,
            EMAWeightAveraging(decay=0.9),
            OnExceptionCheckpoint(tmp_path),
            Fails(),
        )
    path = str(tmp_path / "on_exception.ckpt")
    resumed = fit(tmp_path, again, dm, EMAWeightAveraging(decay=0.9), ckpt_path=path)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    assert resumed == {step: found for step, found in figures.items() if step >= 25}


@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch:UserWarning")
@pytest.mark.parametrize("name", ["ema", "swa"])
def test_averaging_copies_no_trainer_data_model_or_loader(
    name: str, dm: ActivationDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any, memo: Any) -> Any:
        raise AssertionError(f"{type(self).__name__} was copied")

    for kind in (L.Trainer, ActivationDataModule, FrozenModel, PreTrainedModel, ActivationLoader, RowsLoader):
        monkeypatch.setattr(kind, "__deepcopy__", refuse, raising=False)
    module = one(dm.d_in)
    for _ in range(2):  # the second fit copies a module that was trained
        fit(tmp_path, module, dm, AVERAGING[name](), max_epochs=2)


@pytest.mark.slow
def test_the_loss_with_averages_is_measured_wherever_the_callback_stands(
    dm: ActivationDataModule, tmp_path: Path
) -> None:
    found = []
    for order in (1, -1):
        callbacks = [EMAWeightAveraging(decay=0.9), LossRecovered(rows=64)][::order]
        found.append(fit(tmp_path, one(dm.d_in), dm, *callbacks, max_epochs=2))
    assert found[0] == found[1]
    assert any("ce" in name for name in found[0][20])


@pytest.mark.parametrize(("name", "lines"), [("ema", 1), ("ema without buffers", 0)])
def test_a_setting_to_average_buffers_that_is_not_followed_is_said_once(
    name: str, lines: int, dm: ActivationDataModule, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        fit(tmp_path, one(dm.d_in), dm, AVERAGING[name](), max_epochs=1)
    said = [line for line in caplog.messages if "buffers, which are counters, running means and" in line]
    assert len(said) == lines
    assert all(line.startswith("EMAWeightAveraging(use_buffers=True)") for line in said)


@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch:UserWarning")
@pytest.mark.parametrize("name", ["ema", "swa"])
@pytest.mark.slow
def test_averages_of_a_fit_that_writes_a_cache_are_those_of_one_that_does_not_and_resume(
    name: str, tiny: Any, tmp_path: Path
) -> None:
    """The first data epoch ends inside the fit, which goes on with the cache."""

    def run(folder: str, write: bool, **options: Any) -> tuple[Any, ...]:
        cache = str(tmp_path / folder / "cache") if write else None
        dm = data(tiny("gpt2"), texts(14), max_tokens=160, normalize="zscore", write_shards=cache)
        module = one(dm.d_in)
        keep = ModelCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=9, save_top_k=-1)
        return module, fit(tmp_path, module, dm, AVERAGING[name](), keep, **options)

    live, figures = run("live", write=False, max_epochs=2)
    written, of_written = run("written", write=True, max_epochs=2)
    whole, of_whole = run("whole", write=True)
    assert of_written == figures
    assert_same_weights(written, live)
    resumed, of_resumed = run("whole", write=True, ckpt_path=str(tmp_path / "whole" / "step=27.ckpt"))
    assert of_resumed == {step: found for step, found in of_whole.items() if step in of_resumed}
    assert 50 in of_resumed
    assert_same_weights(resumed, whole)
    assert verify(tmp_path / "whole" / "cache").problems == []


def assert_same_weights(module: torch.nn.Module, expected: torch.nn.Module) -> None:
    for key, value in expected.state_dict().items():
        assert torch.equal(value, module.state_dict()[key]), key
