"""Fits with Lightning's tuners equal fits with the values that they found, and resume bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.tuner import Tuner

from deeplens_lightning.datamodule import ActivationDataModule
from deeplens_lightning.sae.grid import SparseAutoencoderGrid
from deeplens_lightning.sae.schedule import lr_factor
from deeplens_lightning.sae.training import DictionaryTraining
from deeplens_lightning.shards import verify
from tests.support.caches import read_back
from tests.support.recorder import Recorder, assert_same
from tests.support.texts import texts
from tests.support.training import data, sae, trainer

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")  # of ModelCheckpoint
SIZED = {"max_tokens": 12 * 16}
EVERY: dict[str, Any] = {"filename": "{step}", "every_n_train_steps": 7, "save_top_k": -1}
SIZES: dict[str, Any] = {"init_val": 16, "max_trials": 2, "steps_per_trial": 2}
RATES: dict[str, Any] = {
    "min_lr": 1e-5,
    "max_lr": 1e-1,
    "num_training_steps": 18,
    "early_stop_threshold": None,
}
MAKE: dict[str, Callable[..., DictionaryTraining]] = {
    "one": sae,
    "grid": lambda dm, **changes: SparseAutoencoderGrid(
        dm.d_in, {"k": [2, 4]}, {"d_sae": 64, "dead_after_tokens": 400, **changes}
    ),
}


class LaterSizes(BatchSizeFinder):
    """Search before epoch 1, as in Lightning's example of milestones."""

    def on_fit_start(self, *_: Any) -> None:
        pass

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 1:
            self.scale_batch_size(trainer, pl_module)


class LaterRates(LearningRateFinder):
    """Search before epoch 1."""

    def on_fit_start(self, *_: Any) -> None:
        pass

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 1:
            self.lr_find(trainer, pl_module)


class Fit:
    """A fit that saves every 7 steps."""

    def __init__(
        self,
        folder: Path,
        module: DictionaryTraining,
        dm: ActivationDataModule,
        callbacks: Sequence[L.Callback] = (),
        ckpt_path: Path | None = None,
        **options: Any,
    ) -> None:
        self.module, self.recorder = module, Recorder()
        keep = ModelCheckpoint(folder, **EVERY)
        self.trainer = trainer(folder, self.recorder, [*callbacks, keep], **options)
        self.trainer.fit(module, dm, ckpt_path=None if ckpt_path is None else str(ckpt_path))


def assert_continues(again: Fit, whole: Fit, at: int) -> None:
    """Check that a fit equals another one from batch `at` on."""
    assert_same(again.recorder.batches, whole.recorder.batches[at:])
    for name, value in whole.module.state_dict().items():
        assert torch.equal(value, again.module.state_dict()[name]), name


def saved_lr(path: Path) -> float | None:
    return torch.load(path, weights_only=True)["hyper_parameters"]["lr"]


@pytest.mark.parametrize(
    ("make", "sized"),
    [
        ("one", False),
        pytest.param("one", True, marks=pytest.mark.slow),
        pytest.param("grid", False, marks=pytest.mark.slow),
        pytest.param("grid", True, marks=pytest.mark.slow),
    ],
)
def test_a_batch_size_finder_leaves_a_fit_that_resumes(
    make: str, sized: bool, tiny: Any, tmp_path: Path
) -> None:
    changes: dict[str, Any] = SIZED if sized else {}
    tuned, plain = data(tiny("gpt2"), **changes), data(tiny("gpt2"), batch_size=32, **changes)
    whole = Fit(tmp_path / "a", MAKE[make](tuned), tuned, [BatchSizeFinder(**SIZES)], max_steps=16)
    assert tuned.batch_size == 32
    assert_continues(whole, Fit(tmp_path / "b", MAKE[make](plain), plain, max_steps=16), 0)
    other = data(tiny("gpt2"), batch_size=32, **changes)
    path = tmp_path / "a" / "step=7.ckpt"
    assert_continues(Fit(tmp_path / "c", MAKE[make](other), other, (), path, max_steps=16), whole, 7)


@pytest.mark.slow
@pytest.mark.parametrize("make", MAKE)
def test_a_batch_size_finder_before_a_later_epoch_continues_the_data(
    make: str, tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dm = data(tiny("gpt2"), **SIZED)
    whole = Fit(tmp_path / "a", MAKE[make](dm), dm, [LaterSizes(**SIZES)], max_epochs=3)
    sizes = [len(batch) for batch, _ in whole.recorder.batches]
    assert sizes == 12 * [16] + 2 * 6 * [32]
    before = {tuple(row) for _, rows in whole.recorder.batches[:12] for row in rows.tolist()}
    after = {tuple(row) for _, rows in whole.recorder.batches[12:] for row in rows.tolist()}
    assert len(after) == 12 * 32
    assert f"batches of 16 rows: {len(before & after)} rows are served again" in caplog.text
    other = data(tiny("gpt2"), batch_size=32, **SIZED)
    path = tmp_path / "a" / "step=14.ckpt"
    again = Fit(tmp_path / "b", MAKE[make](other), other, (), path, max_epochs=3)
    assert_same(again.recorder.batches, whole.recorder.batches[14:])


@pytest.mark.parametrize("sized", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_learning_rate_finder_leaves_a_fit_with_that_rate(sized: bool, tiny: Any, tmp_path: Path) -> None:
    changes: dict[str, Any] = SIZED if sized else {}
    tuned, plain, other = (data(tiny("gpt2"), **changes) for _ in range(3))
    module = sae(tuned)
    whole = Fit(tmp_path / "a", module, tuned, [LearningRateFinder(**RATES)], max_steps=16)
    assert module.lr != sae(plain).lr
    assert_continues(whole, Fit(tmp_path / "b", sae(plain, lr=module.lr), plain, max_steps=16), 0)
    path = tmp_path / "a" / "step=7.ckpt"
    again = Fit(tmp_path / "c", sae(other), other, (), path, max_steps=16)
    assert_continues(again, whole, 7)
    assert (
        module.lr == saved_lr(path) == saved_lr(tmp_path / "c" / "step=14.ckpt") == again.module.hparams["lr"]
    )


@pytest.mark.slow
def test_a_learning_rate_finder_before_a_later_epoch_changes_only_the_rate(tiny: Any, tmp_path: Path) -> None:
    dm, plain, other = (data(tiny("gpt2"), **SIZED) for _ in range(3))
    module = sae(dm)
    whole = Fit(tmp_path / "a", module, dm, [LaterRates(**RATES)], max_epochs=4)
    assert module.lr != sae(plain).lr
    assert_same(whole.recorder.batches, Fit(tmp_path / "b", sae(plain), plain, max_epochs=4).recorder.batches)
    path = tmp_path / "a" / "step=14.ckpt"
    assert_continues(Fit(tmp_path / "c", sae(other), other, (), path, max_epochs=4), whole, 14)


@pytest.mark.parametrize("finder", [BatchSizeFinder(**SIZES), LearningRateFinder(**RATES)])
@pytest.mark.slow
def test_a_tuner_before_a_resumed_fit_is_refused(finder: L.Callback, tiny: Any, tmp_path: Path) -> None:
    dm, other = data(tiny("gpt2")), data(tiny("gpt2"))
    Fit(tmp_path / "a", sae(dm), dm, max_steps=8)
    with pytest.raises(
        ValueError, match="the checkpoint is from step 7, but a LearningRateFinder or BatchSize"
    ):
        Fit(tmp_path / "b", sae(other), other, [finder], tmp_path / "a" / "step=7.ckpt", max_steps=16)


def test_the_rate_that_the_tuner_found_is_in_every_later_checkpoint(tiny: Any, tmp_path: Path) -> None:
    dm, other = data(tiny("gpt2")), data(tiny("gpt2"))
    module = sae(dm)
    rates = {name: value for name, value in RATES.items() if name != "num_training_steps"}
    Tuner(trainer(tmp_path)).lr_find(module, datamodule=dm, num_training=18, update_attr=True, **rates)
    Fit(tmp_path / "a", module, dm, max_steps=16)
    Fit(tmp_path / "b", sae(other), other, (), tmp_path / "a" / "step=7.ckpt", max_steps=16)
    assert module.lr == saved_lr(tmp_path / "a" / "step=14.ckpt") == saved_lr(tmp_path / "b" / "step=14.ckpt")


@pytest.mark.slow
def test_a_resume_with_another_rate_says_that_it_is_not_used(tiny: Any, tmp_path: Path) -> None:
    dm, other = data(tiny("gpt2")), data(tiny("gpt2"))
    whole = Fit(tmp_path / "a", sae(dm, lr=1e-3), dm, max_steps=9)
    with pytest.warns(UserWarning, match=r"lr=0\.1 is not used: the fit continues with lr=0\.001"):
        again = Fit(
            tmp_path / "b", sae(other, lr=0.1), other, (), tmp_path / "a" / "step=7.ckpt", max_steps=9
        )
    assert_continues(again, whole, 7)


@pytest.mark.parametrize("later", [False, True])
def test_a_batch_beyond_the_buffer_names_buffer_size(later: bool, tiny: Any, tmp_path: Path) -> None:
    dm = data(tiny("gpt2"), **SIZED)
    finder = (LaterSizes if later else BatchSizeFinder)(init_val=64, max_trials=5, steps_per_trial=1)
    with pytest.raises(ValueError, match="batch_size=128 rows do not fit in buffer_size=96 rows"):
        Fit(tmp_path, sae(dm), dm, [finder], max_epochs=2)


def test_a_grid_says_that_it_has_no_learning_rate_to_find(tiny: Any, tmp_path: Path) -> None:
    dm = data(tiny("gpt2"))
    with pytest.raises(ValueError, match="a grid has no lr to find"):
        Tuner(trainer(tmp_path)).lr_find(MAKE["grid"](dm), datamodule=dm)
    Fit(tmp_path, MAKE["grid"](dm), dm, [LearningRateFinder(update_attr=False, **RATES)], max_steps=8)


class Rates(L.Callback):
    """The learning rate of every step of a fit, without those of a tuner's trials."""

    def __init__(self) -> None:
        self.found: dict[int, float] = {}

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.found[trainer.global_step] = trainer.optimizers[0].param_groups[0]["lr"]


@pytest.mark.parametrize(
    "finder",
    [pytest.param(LaterRates(**RATES), marks=pytest.mark.slow), LaterSizes(**SIZES)],
    ids=["rates", "sizes"],
)
@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({"max_epochs": 4}, {"rates": 48, "sizes": 30}),
        pytest.param({"max_steps": 40}, {"rates": 40, "sizes": 40}, marks=pytest.mark.slow),
        pytest.param(
            {"max_epochs": 4, "max_steps": 1000}, {"rates": 48, "sizes": 30}, marks=pytest.mark.slow
        ),
        pytest.param(
            {"max_epochs": 4, "accumulate_grad_batches": 5},
            {"rates": 4 * 3, "sizes": 3 + 3 * 2},
            marks=pytest.mark.slow,
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:When using `Trainer.accumulate_grad_batches")
def test_the_schedule_ends_with_the_last_step_after_a_tuner_before_a_later_epoch(
    limits: dict[str, Any], steps: dict[str, int], finder: L.Callback, tiny: Any, tmp_path: Path
) -> None:
    expected = steps["rates" if isinstance(finder, LaterRates) else "sizes"]
    dm, rates = data(tiny("gpt2"), **SIZED), Rates()
    module = sae(dm, lr=1e-3)
    whole = Fit(tmp_path, module, dm, [deepcopy(finder), rates], **limits)
    assert whole.trainer.global_step == expected
    planned = lr_factor(expected, module.optimization)
    assert list(rates.found) == list(range(expected))
    found = {step: rate for step, rate in rates.found.items() if step >= expected - 12}
    assert found == pytest.approx({step: module.lr * planned(step) for step in found}, rel=1e-9)
    assert min(rates.found.values()) > 0
    assert whole.trainer.optimizers[0].param_groups[0]["lr"] == 0


TUNERS: dict[str, Callable[[], L.Callback]] = {
    "rates": lambda: LearningRateFinder(**RATES),
    "later rates": lambda: LaterRates(**RATES),
}


def rows_of(cache: Path) -> list[tuple[int, ...]]:
    """The provenance of all rows of a cache, sorted."""
    assert verify(cache).problems == []
    return sorted(map(tuple, read_back(cache)[1].tolist()))


@pytest.mark.parametrize(
    ("tuner", "sized"),
    [
        pytest.param("rates", False, marks=pytest.mark.slow),
        pytest.param("rates", True, marks=pytest.mark.slow),
        pytest.param("later rates", True, marks=pytest.mark.slow),
    ],
)
def test_a_cache_that_is_written_beside_a_tuner_holds_every_row_once(
    tuner: str, sized: bool, tiny: Any, tmp_path: Path
) -> None:
    changes: dict[str, Any] = SIZED if sized else {}
    limits: dict[str, Any] = {"max_epochs": 5} if sized else {"max_epochs": 2}

    def fit(name: str, *callbacks: L.Callback, write: bool = True) -> Fit:
        cache = str(tmp_path / name / "cache") if write else None
        dm = data(tiny("gpt2"), texts(14), write_shards=cache, **changes)
        return Fit(tmp_path / name, sae(dm), dm, callbacks, **limits)

    whole = fit("tuned", TUNERS[tuner]())
    live = fit("live", TUNERS[tuner](), write=False)
    fit("plain")
    found = rows_of(tmp_path / "tuned" / "cache")
    assert found == rows_of(tmp_path / "plain" / "cache")
    assert len(set(found)) == len(found)
    first = len(live.recorder.batches) // 2  # batches of the first data epoch, or of a part of it
    assert_same(whole.recorder.batches[:first], live.recorder.batches[:first])


@pytest.mark.parametrize("finder", [BatchSizeFinder, pytest.param(LaterSizes, marks=pytest.mark.slow)])
def test_a_batch_size_finder_beside_a_cache_that_is_being_written_is_refused(
    finder: type[BatchSizeFinder], tiny: Any, tmp_path: Path
) -> None:
    dm = data(tiny("gpt2"), write_shards=str(tmp_path / "cache"), **SIZED)
    match = (
        "until it is complete batch_size cannot change to 32: .* run a BatchSizeFinder without write_shards"
    )
    with pytest.raises(ValueError, match=match):
        Fit(tmp_path, sae(dm), dm, [finder(**SIZES)], max_epochs=3)
