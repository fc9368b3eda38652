"""Resuming from every kind of Trainer checkpoint gives the batches and weights of a run that never stopped."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from deeplens_lightning.callbacks import Preemption
from deeplens_lightning.cli.newest_checkpoint import newest_checkpoint
from deeplens_lightning.datamodule import ActivationDataModule
from deeplens_lightning.options import BufferOptions
from tests.support.recorder import Recorder, assert_same
from tests.support.texts import texts
from tests.support.training import data, sae, trainer

SIZED = {"max_tokens": 12 * 16}
INTERVAL = timedelta(milliseconds=40)
EVERY = {"save_top_k": -1, "filename": "{epoch}-{step}", "enable_version_counter": True}

AT_THE_END = {"every_n_epochs": 1, "save_on_train_epoch_end": True}


class Run:
    """One `fit`, with its batches, its SAE and its Trainer."""

    def __init__(
        self,
        folder: Path,
        dm: ActivationDataModule,
        callbacks: list[Any],
        ckpt_path: str | None = None,
        raises: type[BaseException] | None = None,
        **options: Any,
    ) -> None:
        self.recorder = Recorder()
        self.sae = sae(dm)
        self.trainer = trainer(folder, self.recorder, callbacks, **options)
        if raises is None:
            self.trainer.fit(self.sae, dm, ckpt_path=ckpt_path)
        else:
            with pytest.raises(raises):
                self.trainer.fit(self.sae, dm, ckpt_path=ckpt_path)


def processed(path: Path) -> int:
    """The number of batches that were trained on before a checkpoint."""
    loops = torch.load(path, weights_only=True)["loops"]["fit_loop"]
    return loops["epoch_loop.batch_progress"]["total"]["processed"]


def assert_continues(again: Run, whole: Run, at: int, *, weights: bool = True) -> None:
    assert_same(again.recorder.batches, whole.recorder.batches[at:])
    if not weights:
        return
    assert again.recorder.losses == whole.recorder.losses[at:]
    for name, value in whole.sae.state_dict().items():
        assert torch.equal(value, again.sae.state_dict()[name]), name
    ours, theirs = (run.trainer.optimizers[0].state_dict()["state"] for run in (again, whole))
    for index, state in theirs.items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(ours[index][name])), name


CASES: dict[str, dict[str, Any]] = {
    "mid-epoch": {"save": {"every_n_train_steps": 7}, "trainer": {"max_steps": 40}},
    "of known length": {"save": {"every_n_train_steps": 5}, "trainer": {"max_steps": 40}, "data": SIZED},
    "at the end of an epoch": {
        "save": {"every_n_epochs": 1},
        "trainer": {"max_epochs": 4},
        "data": SIZED,
    },
    "at the end of a pass over the data": {
        "save": {"every_n_epochs": 1},
        "trainer": {"max_epochs": 3},
        "documents": 20,
    },
    "after validation": {
        "save": {},
        "trainer": {"max_steps": 40, "val_check_interval": 6, "check_val_every_n_epoch": None},
    },
    "after validation inside an epoch": {
        "save": {},
        "trainer": {"max_epochs": 3, "val_check_interval": 4},
        "data": SIZED,
    },
    "accumulated": {
        "save": {"every_n_train_steps": 4},
        "trainer": {"max_steps": 14, "accumulate_grad_batches": 3},
        "data": SIZED,
    },
    "limited": {"save": {"every_n_train_steps": 3}, "trainer": {"max_epochs": 5, "limit_train_batches": 5}},
    "limited below a known length": {
        "save": {"every_n_train_steps": 3},
        "trainer": {"max_epochs": 5, "limit_train_batches": 5},
        "data": SIZED,
    },
    "at the end of an epoch before a number of steps": {
        "save": AT_THE_END,
        "trainer": {"max_epochs": 4, "max_steps": 1000},
        "data": SIZED,
    },
    "at the end of an epoch without validation": {
        "save": AT_THE_END,
        "trainer": {"max_epochs": 4, "max_steps": 1000, "limit_val_batches": 0},
        "data": SIZED,
    },
    "at the end of an accumulated epoch": {
        "save": AT_THE_END,
        "trainer": {"max_steps": 11, "accumulate_grad_batches": 5, "limit_val_batches": 0},
        "data": SIZED,
    },
    "at the end of a pass before a number of steps": {
        "save": AT_THE_END,
        "trainer": {"max_epochs": 3, "max_steps": 1000, "accumulate_grad_batches": 2},
        "documents": 20,
    },
    "with loaders made anew": {
        "save": {"every_n_train_steps": 5},
        "trainer": {"max_epochs": 4, "reload_dataloaders_every_n_epochs": 1},
        "data": SIZED,
    },
    "prefetched": {"save": {"every_n_train_steps": 7}, "trainer": {"max_steps": 30}, "data": {"prefetch": 3}},
    "by time": {
        "save": {"train_time_interval": INTERVAL},
        "trainer": {"max_steps": 40},
        "pauses": (9, 19, 29),
    },
    "normalised": {
        "save": {"every_n_train_steps": 7},
        "trainer": {"max_steps": 30},
        "data": {"normalize": "zscore", "buffer_options": BufferOptions(max_norm_ratio=3.0)},
    },
}


SLOW = (
    "at the end of an epoch without validation",
    "at the end of an accumulated epoch",
    "at the end of a pass before a number of steps",
)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in CASES]
)
def test_checkpoints_resume_bit_for_bit(case: str, tiny: Any, tmp_path: Path) -> None:
    what = CASES[case]
    documents = texts(what.get("documents", 60))

    def fresh() -> ActivationDataModule:
        return data(tiny("gpt2"), documents, **what.get("data", {}))

    keep = ModelCheckpoint(tmp_path / "kept", **(EVERY | what["save"]))
    pauses = [At(batch, lambda: time.sleep(INTERVAL.total_seconds())) for batch in what.get("pauses", ())]
    whole = Run(tmp_path, fresh(), [*pauses, keep], **what["trainer"])
    saved = sorted((tmp_path / "kept").glob("*.ckpt"), key=processed)
    total = len(whole.recorder.batches)
    saved = [path for path in saved if processed(path) < total]
    assert len(saved) >= 2
    for path in {saved[0], saved[len(saved) // 2], saved[-1]}:
        again = Run(tmp_path, fresh(), [], str(path), **what["trainer"])
        assert_continues(again, whole, processed(path))
        assert again.trainer.global_step == whole.trainer.global_step


class SaveIn(L.Callback):
    """Save a checkpoint in the hook of one epoch's start or end."""

    def __init__(self, hook: str, epoch: int, path: Path) -> None:
        self.epoch, self.path = epoch, path
        setattr(self, hook, self._save)

    def _save(self, trainer: L.Trainer, _: Any) -> None:
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


BOTH = {"max_epochs": 3, "max_steps": 1000}


@pytest.mark.parametrize(
    "limits",
    [
        BOTH,
        *(pytest.param(limit, marks=pytest.mark.slow) for limit in ({"max_epochs": 3}, {"max_steps": 33})),
    ],
)
@pytest.mark.parametrize(
    ("hook", "epoch", "at"),
    [
        ("on_train_epoch_start", 1, 12),
        ("on_train_epoch_end", 0, 12),
        pytest.param("on_train_epoch_end", 1, 24, marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_from_between_two_epochs_resumes_bit_for_bit(
    hook: str, epoch: int, at: int, limits: dict[str, Any], tiny: Any, tmp_path: Path
) -> None:
    save = SaveIn(hook, epoch, tmp_path / "a.ckpt")
    whole = Run(tmp_path, data(tiny("gpt2"), **SIZED), [save], **limits)
    again = Run(tmp_path, data(tiny("gpt2"), **SIZED), [], str(tmp_path / "a.ckpt"), **limits)
    assert_continues(again, whole, at)
    assert again.trainer.current_epoch == whole.trainer.current_epoch


@pytest.mark.parametrize("limits", [{"max_epochs": 3}, pytest.param(BOTH, marks=pytest.mark.slow)])
@pytest.mark.parametrize("at", [20, *(pytest.param(at, marks=pytest.mark.slow) for at in (8, 12, 32))])
def test_a_checkpoint_of_a_stop_inside_an_epoch_trains_the_rest_of_that_epoch(
    at: int, limits: dict[str, Any], tiny: Any, tmp_path: Path
) -> None:
    whole = Run(tmp_path, data(tiny("gpt2"), **SIZED), [], **limits)
    keep = ModelCheckpoint(tmp_path / "kept", **AT_THE_END)
    first = Run(tmp_path, data(tiny("gpt2"), **SIZED), [StopAfter(at), keep], **limits)
    assert len(first.recorder.batches) == at
    again = Run(tmp_path, data(tiny("gpt2"), **SIZED), [], keep.best_model_path, **limits)
    assert_continues(again, whole, at)
    assert again.trainer.current_epoch == whole.trainer.current_epoch


class StopAfter(L.Callback):
    """Stop training after a number of batches."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.batches -= 1
        trainer.should_stop = self.batches == 0


def test_a_run_that_fails_twice_resumes_bit_for_bit(tiny: Any, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=9, **EVERY)
    whole = Run(tmp_path, data(tiny("gpt2")), [], max_steps=40)
    Run(tmp_path, data(tiny("gpt2")), [keep, At(10, _fail)], raises=RuntimeError, max_steps=40)
    first = str(tmp_path / "kept" / "epoch=0-step=9.ckpt")
    Run(tmp_path, data(tiny("gpt2")), [keep, At(20, _fail)], first, raises=RuntimeError, max_steps=40)
    second = tmp_path / "kept" / "epoch=0-step=27.ckpt"
    third = Run(tmp_path, data(tiny("gpt2")), [], str(second), max_steps=40)
    assert_continues(third, whole, 27)


class At(L.Callback):
    """Call a function at a batch, in a hook of Lightning."""

    def __init__(self, batch: int, what: Callable[[], Any], hook: str = "on_train_batch_start") -> None:
        self.batch, self.what = batch, what
        setattr(self, hook, self._count)

    def _count(self, *_: Any, **__: Any) -> None:
        self.batch -= 1
        if self.batch == -1:
            self.what()


def _fail() -> None:
    raise RuntimeError("raised by the test")


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("batch", [0, 1, 12, 23])
def test_the_checkpoint_of_an_exception_resumes_bit_for_bit(
    batch: int, sized: bool, tiny: Any, tmp_path: Path
) -> None:
    options = SIZED if sized else {}
    whole = Run(tmp_path, data(tiny("gpt2"), **options), [], max_steps=30)
    Run(
        tmp_path,
        data(tiny("gpt2"), **options),
        [At(batch, _fail), OnExceptionCheckpoint(tmp_path)],
        raises=RuntimeError,
        max_steps=30,
    )
    path = tmp_path / "on_exception.ckpt"
    assert processed(path) == batch
    again = Run(tmp_path, data(tiny("gpt2"), **options), [], str(path), max_steps=30)
    assert_continues(again, whole, batch)


def test_the_checkpoint_of_a_sigterm_resumes_bit_for_bit(tiny: Any, tmp_path: Path) -> None:
    whole = Run(tmp_path, data(tiny("gpt2")), [], max_steps=30)
    stop = At(11, lambda: os.kill(os.getpid(), signal.SIGTERM))
    save = ModelCheckpoint(tmp_path / "kept", save_on_exception=True, **EVERY)
    Run(tmp_path, data(tiny("gpt2")), [stop, save], raises=SIGTERMException, max_steps=30)
    (path,) = (tmp_path / "kept").glob("*.ckpt")
    again = Run(tmp_path, data(tiny("gpt2")), [], str(path), max_steps=30)
    assert_continues(again, whole, processed(path))


def test_a_run_that_reaches_max_time_resumes_with_the_next_batch(tiny: Any, tmp_path: Path) -> None:
    whole = Run(tmp_path, data(tiny("gpt2")), [], max_steps=150)
    keep = ModelCheckpoint(tmp_path / "kept", save_on_train_epoch_end=True, **EVERY)
    pause = At(20, lambda: time.sleep(0.1))  # so that the time is over after 20 batches at the latest
    first = Run(tmp_path, data(tiny("gpt2")), [keep, pause], max_steps=150, max_time={"seconds": 0.1})
    (path,) = (tmp_path / "kept").glob("*.ckpt")
    at = processed(path)
    assert at == len(first.recorder.batches) < 150
    again = Run(tmp_path, data(tiny("gpt2")), [], str(path), max_steps=150)
    assert_same(again.recorder.batches, whole.recorder.batches[at:])


def test_a_checkpoint_saved_after_the_fit_resumes_with_the_next_batch(tiny: Any, tmp_path: Path) -> None:
    whole = Run(tmp_path, data(tiny("gpt2")), [], max_steps=30)
    first = Run(tmp_path, data(tiny("gpt2")), [], max_steps=17)
    first.trainer.save_checkpoint(tmp_path / "after.ckpt")
    again = Run(tmp_path, data(tiny("gpt2")), [], str(tmp_path / "after.ckpt"), max_steps=30)
    assert_continues(again, whole, 17, weights=False)  # the learning rate follows another max_steps


def test_the_validation_set_is_the_same_after_a_resume(tiny: Any, tmp_path: Path) -> None:
    class Rows(L.Callback):
        def __init__(self) -> None:
            self.rows: list[torch.Tensor] = []

        def on_validation_batch_start(self, trainer: Any, module: Any, batch: Any, *_: Any) -> None:
            self.rows.append(batch.clone())

    keep = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=10, **EVERY)
    options: dict[str, Any] = {"max_steps": 20, "val_check_interval": 5, "limit_val_batches": 2}
    options["check_val_every_n_epoch"] = None
    first, second = Rows(), Rows()
    Run(tmp_path, data(tiny("gpt2")), [first, keep], **options)
    path = tmp_path / "kept" / "epoch=0-step=10.ckpt"
    Run(tmp_path, data(tiny("gpt2")), [second], str(path), **options)
    assert len(first.rows) == 8
    assert all(torch.equal(row, first.rows[i % 2]) for i, row in enumerate(first.rows + second.rows))


def test_a_checkpoint_without_our_state_is_refused(tiny: Any, tmp_path: Path) -> None:
    class Renamed(ActivationDataModule):
        pass

    first = Run(tmp_path, data(tiny("gpt2")), [], max_steps=5)
    first.trainer.save_checkpoint(tmp_path / "a.ckpt")
    dm = data(tiny("gpt2"))
    renamed = Renamed(
        tiny("gpt2"), layer=1, dataset_name=texts(60), batch_size=16, buffer_size=96, seq_length=32
    )
    with pytest.raises(ValueError, match=r"holds no state of .*Renamed, so the data would start from the"):
        trainer(tmp_path, max_steps=10).fit(sae(dm), renamed, ckpt_path=str(tmp_path / "a.ckpt"))


def test_the_state_in_a_checkpoint_is_small_and_loads_with_weights_only(tiny: Any, tmp_path: Path) -> None:
    run = Run(tmp_path, data(tiny("gpt2"), buffer_size=16_000), [], max_steps=5)
    run.trainer.save_checkpoint(tmp_path / "a.ckpt")
    whole = torch.load(tmp_path / "a.ckpt", weights_only=True)
    ours = whole["ActivationDataModule"]
    torch.save(ours, tmp_path / "ours.pt")
    assert (tmp_path / "ours.pt").stat().st_size < 20_000


def test_resuming_inside_a_gradient_accumulation_warns_of_lost_gradients(tiny: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": 3, "max_steps": 8}
    whole = Run(tmp_path, data(tiny("gpt2")), [], **options)
    stop = [At(7, _fail), OnExceptionCheckpoint(tmp_path)]
    Run(tmp_path, data(tiny("gpt2")), stop, raises=RuntimeError, **options)
    path = tmp_path / "on_exception.ckpt"
    with pytest.warns(
        UserWarning, match=r"1 batch\(es\) into an accumulation of 3: Lightning saves no gradients"
    ):
        again = Run(tmp_path, data(tiny("gpt2")), [], str(path), **options)
    assert_continues(again, whole, 7, weights=False)


def test_resuming_warns_when_the_end_of_an_epoch_shifts_the_accumulation(tiny: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": 3, "max_epochs": 2}
    keep = ModelCheckpoint(tmp_path / "kept", every_n_epochs=1, **EVERY)
    whole = Run(tmp_path, data(tiny("gpt2"), texts(14)), [keep], **options)
    path = min((tmp_path / "kept").glob("*.ckpt"), key=processed)
    assert processed(path) % 3, "the epoch does not end inside an accumulation"
    with pytest.warns(UserWarning, match="on the last batch of an epoch of unknown length"):
        again = Run(tmp_path, data(tiny("gpt2"), texts(14)), [], str(path), **options)
    assert_continues(again, whole, processed(path), weights=False)


def test_a_preempted_run_finishes_its_batch_saves_and_resumes_bit_for_bit(tiny: Any, tmp_path: Path) -> None:
    whole = Run(tmp_path, data(tiny("gpt2")), [], max_steps=30)
    before = signal.getsignal(signal.SIGTERM)
    stop = At(11, lambda: os.kill(os.getpid(), signal.SIGTERM), "on_before_optimizer_step")
    Run(tmp_path, data(tiny("gpt2")), [stop, Preemption()], raises=SIGTERMException, max_steps=30)
    assert signal.getsignal(signal.SIGTERM) is before
    path = newest_checkpoint(tmp_path)
    assert path == tmp_path / Preemption.FILE
    assert processed(path) == 12, "the batch was not finished"
    again = Run(tmp_path, data(tiny("gpt2")), [Preemption()], str(path), max_steps=30)
    assert_continues(again, whole, 12)


def test_slurm_requeues_through_lightning_at_the_end_of_the_batch(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/requeued\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    given = {"JOB_ID": "77", "JOB_NAME": "sae", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in given.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    whole = Run(tmp_path / "whole", data(tiny("gpt2")), [], max_steps=20)
    warn = At(8, lambda: os.kill(os.getpid(), signal.SIGUSR1), "on_before_optimizer_step")
    kill = At(10, _fail)  # SLURM ends the job a little later
    Run(tmp_path, data(tiny("gpt2")), [warn, kill, Preemption()], raises=RuntimeError, max_steps=20)
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"
    saved = tmp_path / "hpc_ckpt_1.ckpt"
    assert processed(saved) == 9, "the batch was not finished"
    again = Run(tmp_path, data(tiny("gpt2")), [Preemption()], max_steps=20)  # Lightning finds it by itself
    assert_continues(again, whole, 9)
