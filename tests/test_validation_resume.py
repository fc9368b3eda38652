"""Validation after a resume: the figures and rows of a run that never stopped, whatever the checkpoint interrupted."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint

from deeplens_lightning.callbacks import FitSummary
from deeplens_lightning.cli.newest_checkpoint import newest_checkpoint
from deeplens_lightning.reporting.report import write_report
from deeplens_lightning.reporting.run_data import find_run
from deeplens_lightning.sae import SparseAutoencoder
from deeplens_lightning.sae.training import DictionaryTraining
from tests.support.training import data, sae, trainer
from tests.test_trainer_resume import EVERY, SIZED, Run, assert_continues, processed


def fail() -> None:
    raise RuntimeError("raised by the test")


class HeldOut(L.Callback):
    """Number of rows and figures of every validation, by step."""

    def __init__(self) -> None:
        self.found: dict[int, dict[str, float]] = {}
        self.rows = 0

    def on_validation_batch_start(self, trainer: Any, module: Any, batch: Any, *_: Any) -> None:
        self.rows += len(batch)

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        metrics = {name: float(x) for name, x in trainer.callback_metrics.items() if name.startswith("val/")}
        self.found[trainer.global_step] = metrics | {"rows": self.rows}
        self.rows = 0


class Fails(L.Callback):
    """Raise at the third batch of the validation at step 24."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self._at)

    def _at(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        if trainer.global_step == 24 and args[-2] == 2:
            fail()


VALIDATED: dict[str, dict[str, Any]] = {
    "inside an epoch": {"max_epochs": 3, "val_check_interval": 4},
    "at the end of an epoch": {"max_epochs": 3},
    "by steps": {"max_steps": 36, "val_check_interval": 6, "check_val_every_n_epoch": None},
}
STOPS = ("raised before a batch", "raised in a batch", "raised after a batch", "saved in a batch")
QUICK = (("inside an epoch", "raised in a batch"), ("at the end of an epoch", "raised after a batch"))


@pytest.mark.parametrize(
    ("case", "stop"),
    [
        pytest.param(case, stop, marks=() if (case, stop) in QUICK else pytest.mark.slow)
        for case in VALIDATED
        for stop in STOPS
    ],
)
def test_a_validation_that_a_checkpoint_interrupted_is_repeated_as_a_whole(
    case: str, stop: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = VALIDATED[case]
    whole, again = HeldOut(), HeldOut()
    first = Run(tmp_path, data(tiny("gpt2"), **SIZED), [whole], **options)
    assert {figures["rows"] for figures in whole.found.values()} == {64}
    path = tmp_path / ("saved.ckpt" if "saved" in stop else "on_exception.ckpt")

    def interrupted(module: SparseAutoencoder, batch: Any, batch_idx: int) -> None:
        if module.global_step == 24 and batch_idx == 2:
            if "saved" not in stop:
                fail()
            module.trainer.save_checkpoint(path)
        DictionaryTraining.validation_step(module, batch, batch_idx)

    callbacks: list[L.Callback] = [OnExceptionCheckpoint(tmp_path)]
    with monkeypatch.context() as patch:
        if "in a batch" in stop:
            patch.setattr(SparseAutoencoder, "validation_step", interrupted)
        else:
            where = "on_validation_batch_start" if "before" in stop else "on_validation_batch_end"
            callbacks.append(Fails(where))
        raises = None if "saved" in stop else RuntimeError
        Run(tmp_path, data(tiny("gpt2"), **SIZED), callbacks, raises=raises, **options)
    resumed = Run(tmp_path, data(tiny("gpt2"), **SIZED), [again], str(path), **options)
    assert_continues(resumed, first, 24)
    assert again.found == {step: figures for step, figures in whole.found.items() if step >= 24}


@pytest.mark.slow
@pytest.mark.parametrize("save", [{}, {"every_n_train_steps": 5}, {"save_on_train_epoch_end": True}])
@pytest.mark.parametrize("case", VALIDATED)
def test_held_out_figures_after_a_resume_are_those_of_a_run_that_never_stopped(
    case: str, save: dict[str, Any], tiny: Any, tmp_path: Path
) -> None:
    options = VALIDATED[case]
    whole, again = HeldOut(), HeldOut()
    keep = ModelCheckpoint(tmp_path / "kept", **(EVERY | save))
    Run(tmp_path, data(tiny("gpt2"), **SIZED), [whole, keep], **options)
    paths = sorted((tmp_path / "kept").glob("*.ckpt"), key=processed)
    path = paths[len(paths) // 2]
    at = processed(path)
    Run(tmp_path, data(tiny("gpt2"), **SIZED), [again], str(path), **options)
    assert again.found == {step: figures for step, figures in whole.found.items() if step > at}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [(EarlyStopping, {"val_rows": 0}), (ModelCheckpoint, {"val_fraction": 0}), (ModelCheckpoint, {})],
)
def test_a_monitor_of_held_out_metrics_without_held_out_rows_is_refused(
    kind: Any, changes: dict[str, Any], tiny: Any, tmp_path: Path
) -> None:
    limit: dict[str, Any] = {} if changes else {"limit_val_batches": 0}
    match = r"monitor='val/fvu'\) would never find a value: there is no validation.* This fit logs train/fvu"
    dm = data(tiny("gpt2"), **changes)
    with pytest.raises(ValueError, match=match):
        trainer(tmp_path, None, [kind(monitor="val/fvu")], max_steps=3, **limit).fit(sae(dm), dm)


@pytest.mark.parametrize("limit", [0, 1.0])
@pytest.mark.parametrize("when", [{"every_n_train_steps": 3}, {"train_time_interval": timedelta(seconds=0)}])
def test_a_checkpoint_by_steps_or_time_whose_metric_is_missing_says_which_there_are(
    when: dict[str, Any], limit: float, tiny: Any, tmp_path: Path
) -> None:
    dm = data(tiny("gpt2"))
    keep = ModelCheckpoint(tmp_path / "kept", monitor="train/fuv", **when)
    there = "train/dead_fraction, train/fvu, train/l0, train/loss, epoch, step"
    match = rf"monitor='train/fuv'\) saves nothing.*: up to step 2 training has logged no such metric, but {there}"
    match += "; a validation adds those under val/" if limit else "$"
    with pytest.warns(UserWarning, match=match):
        trainer(tmp_path, None, [keep], max_steps=7, log_every_n_steps=2, limit_val_batches=limit).fit(
            sae(dm), dm
        )
    assert not list((tmp_path).rglob("*.ckpt"))


@pytest.mark.parametrize("monitor", ["train/fvu", "step", "mine", "val/fvu"])
def test_a_checkpoint_by_steps_whose_metric_is_there_says_nothing(
    monitor: str, tiny: Any, tmp_path: Path
) -> None:
    class Logs(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
            module.log("mine", 1.0)

    dm = data(tiny("gpt2"))
    keep = ModelCheckpoint(tmp_path / "kept", monitor=monitor, every_n_train_steps=3)
    options: dict[str, Any] = {"val_check_interval": 4, "check_val_every_n_epoch": None}
    trainer(tmp_path, None, [Logs(), keep], max_steps=8, log_every_n_steps=2, **options).fit(sae(dm), dm)
    assert list(tmp_path.rglob("*.ckpt"))


def test_checkpoints_with_a_metric_in_their_names_are_found_and_the_run_is_reported(
    tiny: Any, tmp_path: Path
) -> None:
    dm = data(tiny("gpt2"))
    keep = ModelCheckpoint(tmp_path / "kept", filename="{step}-{val/fvu:.3f}", monitor="val/fvu")
    options: dict[str, Any] = {"max_steps": 6, "val_check_interval": 3, "check_val_every_n_epoch": None}
    whole = Run(tmp_path, dm, [keep, FitSummary()], **options)
    path = newest_checkpoint(tmp_path)
    assert path == Path(keep.best_model_path)
    assert path.parent.parent == tmp_path / "kept", "the slash makes a folder"
    assert find_run(tmp_path) == tmp_path
    assert write_report(tmp_path).is_file()
    again = Run(tmp_path, data(tiny("gpt2")), [], str(path), **options)
    assert_continues(again, whole, processed(path))
