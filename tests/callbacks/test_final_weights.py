"""The weights behind the figures of a summary are in the file that it names, and the last weights resume exactly."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    LambdaCallback,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities.exceptions import SIGTERMException

from deeplens_lightning.callbacks import FitSummary, LossRecovered, Preemption, final_weights
from deeplens_lightning.callbacks.final_weights import _checksum
from deeplens_lightning.cli.newest_checkpoint import newest_checkpoint
from tests.support.ranks import launch
from tests.support.recorder import Recorder, assert_same
from tests.support.training import data, sae, trainer

EPOCH = 6  # batches


def make(lm: str, ranks: int = 1, **changes: Any) -> Any:
    return data(lm, **({"max_tokens": ranks * EPOCH * 16} | changes))


class At(L.Callback):
    """Call a function when a number of batches was trained on."""

    def __init__(self, batches: int, call: Callable[[L.Trainer], Any]) -> None:
        self.batches, self.call = batches, call

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.batches:
            self.call(trainer)


def fail(_: Any) -> None:
    raise RuntimeError("raised by the test")


def terminate(_: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def stop(trainer: L.Trainer) -> None:
    trainer.should_stop = True


def fit(
    folder: Path,
    lm: str,
    *callbacks: L.Callback,
    ckpt_path: Any = None,
    raises: type[BaseException] | None = None,
    ranks: int = 1,
    data_options: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[dict[str, Any], L.Trainer]:
    """Fit with a summary; return the summary, and the Trainer."""
    settings: dict[str, Any] = {"enable_checkpointing": True, "max_epochs": 2, "log_every_n_steps": 1}
    dm = make(lm, ranks, **(data_options or {}))
    run = trainer(folder, None, [*callbacks, FitSummary()], **(settings | options))
    if raises is None:
        run.fit(sae(dm), dm, ckpt_path=ckpt_path)
    else:
        with pytest.raises(raises):
            run.fit(sae(dm), dm, ckpt_path=ckpt_path)
    return json.loads((folder / "summary.json").read_text()) if run.is_global_zero else {}, run


def assert_file_gives_the_figures(summary: dict[str, Any], folder: Path, lm: str) -> None:
    """Load the file that the summary names, validate, and compare."""
    dm = make(lm)
    (figures,) = trainer(folder).validate(sae(dm), dm, ckpt_path=summary["figures"]["file"], verbose=False)
    for name in ("val/fvu", "val/l0", "val/cosine"):
        assert figures[name] == pytest.approx(summary["metrics"][name], rel=1e-6), name


def saved_step(path: str | None) -> int:
    assert path is not None
    return int(torch.load(path, weights_only=True)["global_step"])


def keep(folder: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder / "kept", **options)


IN_STEPS: dict[str, Any] = {"val_check_interval": 3, "check_val_every_n_epoch": None}
# What is fitted, and the steps of the figures and of the last weights.
CASES: dict[str, tuple[Callable[[Path], dict[str, Any]], int, int]] = {
    "no ModelCheckpoint": (lambda _: {"max_steps": 8}, 8, 8),
    "ModelCheckpoint": (lambda folder: {"callbacks": [keep(folder)]}, 12, 12),
    "monitor": (lambda folder: {"callbacks": [keep(folder, monitor="val/fvu", mode="max")]}, 12, 12),
    "every_n_train_steps": (
        lambda folder: {"callbacks": [keep(folder, every_n_train_steps=5, save_last=True)]},
        12,
        12,
    ),
    "accumulation": (lambda _: {"accumulate_grad_batches": 4, "max_steps": 3}, 3, 3),
    "validation in steps": (lambda _: IN_STEPS | {"max_steps": 8}, 8, 8),
    "max_time": (
        lambda _: {"max_time": timedelta(seconds=0.2), "callbacks": [At(3, lambda _: time.sleep(0.2))]},
        3,
        3,
    ),
    "SIGTERM": (
        lambda folder: {"callbacks": [keep(folder), At(8, terminate)], "raises": SIGTERMException},
        6,
        8,
    ),
    "Preemption": (
        lambda folder: {
            "callbacks": [keep(folder), Preemption(folder / "kept"), At(8, terminate)],
            "raises": SIGTERMException,
        },
        6,
        8,
    ),
    "exception": (
        lambda folder: {
            "callbacks": [keep(folder, save_top_k=-1, every_n_train_steps=2), At(9, fail)],
            "raises": RuntimeError,
        },
        6,
        9,
    ),
}
QUICK = ("no ModelCheckpoint", "exception")


def quick(names: Any, chosen: Sequence[str]) -> list[Any]:
    """The names as parameters; all but the chosen ones are slow."""
    return [pytest.param(name, marks=() if name in chosen else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("case", quick(CASES, QUICK))
def test_the_named_file_gives_the_figures_of_the_summary(
    case: str, tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, figures, last = CASES[case]
    given = options(tmp_path)
    summary, _ = fit(tmp_path, tiny("gpt2"), *given.pop("callbacks", ()), **given)
    assert (summary["figures"]["step"], summary["last"]["step"]) == (figures, last)
    assert saved_step(summary["last"]["file"]) == last
    assert_file_gives_the_figures(summary, tmp_path, tiny("gpt2"))
    printed = "".join(capsys.readouterr().out.split()).replace("│", "")
    assert f"step{figures}:{summary['figures']['file']}" in printed
    assert f"step{last}:{summary['last']['file']}" in printed
    assert saved_step(str(newest_checkpoint(tmp_path))) == last


def _on_two_ranks(rank: int, ranks: int, folder: Path, lm: str) -> None:
    fit(folder, lm, ranks=ranks, strategy="ddp", devices=ranks, max_steps=8)


@pytest.mark.slow
def test_two_ranks_save_the_weights_of_their_figures(tiny: Any, tmp_path: Path) -> None:
    launch(2, _on_two_ranks, tmp_path, tiny("gpt2"))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["figures"] == summary["last"]
    assert saved_step(summary["last"]["file"]) == 8
    assert_file_gives_the_figures(summary, tmp_path, tiny("gpt2"))


def _one_of_two_fails(rank: int, ranks: int, folder: Path, lm: str) -> str:
    dm, at = make(lm, ranks), At(4, fail if rank else lambda _: None)
    run = trainer(
        folder,
        None,
        [at, FitSummary()],
        strategy="ddp",
        devices=ranks,
        max_steps=8,
        enable_checkpointing=True,
    )
    try:
        run.fit(sae(dm), dm)
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_a_rank_that_loses_another_one_saves_without_it(tiny: Any, tmp_path: Path) -> None:
    other, failed = launch(2, _one_of_two_fails, tmp_path, tiny("gpt2"), seconds=100)
    assert failed == "raised by the test"
    assert other != ""
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["stopped"].startswith("RuntimeError")
    assert saved_step(summary["last"]["file"]) == summary["last"]["step"] == 4


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_weights_that_a_callback_has_saved_are_not_written_again(
    every: int, tiny: Any, tmp_path: Path
) -> None:
    summary, _ = fit(tmp_path, tiny("gpt2"), keep(tmp_path, every_n_train_steps=every), max_epochs=1)
    (file,) = tmp_path.rglob("*.ckpt")
    assert summary["last"] == summary["figures"]
    assert summary["last"]["file"] == str(file)


@pytest.mark.slow
def test_the_best_and_the_last_weights_are_shown_each_with_its_file(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = keep(tmp_path, monitor="val/fvu", mode="max")  # the worst, so that it is not the last
    summary, _ = fit(tmp_path, tiny("gpt2"), best)
    (shown,) = summary["best"]
    assert (shown["monitor"], shown["step"], shown["file"]) == ("val/fvu", 6, best.best_model_path)
    assert not shown["value_is_older"]
    assert shown["value"] > summary["metrics"]["val/fvu"]
    assert summary["last"]["file"] != shown["file"]
    dm = make(tiny("gpt2"))
    (figures,) = trainer(tmp_path).validate(sae(dm), dm, ckpt_path=shown["file"], verbose=False)
    assert figures["val/fvu"] == pytest.approx(shown["value"], rel=1e-6)
    assert f"bestval/fvu{shown['value']:.4f}atstep6:" in _squeezed(capsys.readouterr().out)


@pytest.mark.slow
def test_a_best_file_whose_monitored_value_is_older_is_not_shown_with_it(tiny: Any, tmp_path: Path) -> None:
    best = keep(tmp_path, monitor="val/fvu", every_n_train_steps=4)
    summary, _ = fit(tmp_path, tiny("gpt2"), best, max_steps=8, **IN_STEPS)
    (shown,) = summary["best"]
    assert shown["step"] == 8, "saved with the figure of step 6"
    assert shown["value_is_older"]


def _squeezed(printed: str) -> str:
    return "".join(printed.split()).replace("│", "")


@pytest.mark.parametrize(
    "off", [{"enable_checkpointing": False}, pytest.param({"fast_dev_run": 2}, marks=pytest.mark.slow)]
)
def test_nothing_is_saved_where_saving_is_off_and_the_summary_says_so(
    off: dict[str, Any], tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary, _ = fit(tmp_path, tiny("gpt2"), **off)
    assert list(tmp_path.rglob("*.ckpt")) == []
    assert summary["figures"] == summary["last"]
    assert summary["last"]["file"] is None
    assert "theseweightsarenotkept:savingisoff" in _squeezed(capsys.readouterr().out)


def test_figures_of_weights_that_are_not_kept_say_so(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary, _ = fit(tmp_path, tiny("gpt2"), keep(tmp_path, save_top_k=0), At(8, fail), raises=RuntimeError)
    assert summary["stopped"] == "RuntimeError raised by the test"
    assert (summary["figures"]["step"], summary["figures"]["file"]) == (6, None)
    assert saved_step(summary["last"]["file"]) == 8
    assert "step6:theseweightsarenotkept" in _squeezed(capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("signalled_at", [8, 12])
def test_a_signal_to_stop_starts_no_validation(signalled_at: int, tiny: Any, tmp_path: Path) -> None:
    validated: list[int] = []
    note = LambdaCallback(on_validation_start=lambda run, _: validated.append(run.global_step))
    callbacks = (note, Preemption(), At(signalled_at, terminate))
    options: dict[str, Any] = {"max_steps": 12, "val_check_interval": 5, "check_val_every_n_epoch": None}
    fit(tmp_path, tiny("gpt2"), *callbacks, raises=SIGTERMException, **options)
    assert validated == [5, *([10] if signalled_at > 10 else [])]


def test_a_failure_to_save_is_logged_and_the_first_error_is_raised(
    tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with caplog.at_level(logging.ERROR), monkeypatch.context() as patch:
        patch.setattr(TorchCheckpointIO, "save_checkpoint", full)
        callbacks = (keep(tmp_path, save_top_k=0), At(8, fail))
        summary, _ = fit(tmp_path, tiny("gpt2"), *callbacks, raises=RuntimeError, max_steps=20)
    assert "saving the last weights after RuntimeError" in caplog.text
    assert summary["last"]["file"] is None
    assert summary["last"]["why_not"] == "no checkpoint was saved at this step"


@pytest.mark.slow
def test_a_file_of_another_run_is_not_replaced(tiny: Any, tmp_path: Path) -> None:
    first, _ = fit(tmp_path, tiny("gpt2"), keep(tmp_path, save_top_k=0), max_steps=3)
    with pytest.warns(UserWarning, match="exists and is not empty"):
        second, _ = fit(tmp_path, tiny("gpt2"), keep(tmp_path), max_steps=5, limit_val_batches=0)
    assert saved_step(first["last"]["file"]) == 3
    assert saved_step(second["last"]["file"]) == 5


@pytest.mark.slow
def test_a_fit_that_was_at_its_end_already_keeps_its_summary(tiny: Any, tmp_path: Path) -> None:
    first, _ = fit(tmp_path, tiny("gpt2"))
    before = (tmp_path / "summary.json").stat().st_mtime_ns
    again, _ = fit(tmp_path, tiny("gpt2"), ckpt_path=first["last"]["file"], enable_checkpointing=False)
    assert again == first
    assert (tmp_path / "summary.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_two_summaries_in_one_trainer_are_one(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path, tiny("gpt2"), FitSummary(), max_epochs=1)
    assert capsys.readouterr().out.count("tokens/s") == 1
    assert len(list(tmp_path.rglob("*.ckpt"))) == 1


@pytest.mark.slow
def test_a_plain_trainer_keeps_lightnings_own_behaviour(tiny: Any, tmp_path: Path) -> None:
    dm = make(tiny("gpt2"))
    trainer(tmp_path, None, [keep(tmp_path, every_n_train_steps=10)], max_steps=11).fit(sae(dm), dm)
    assert [path.name for path in tmp_path.rglob("*.ckpt")] == ["epoch=1-step=10.ckpt"]


@pytest.mark.slow
def test_the_loss_is_measured_once_at_the_end(tiny: Any, tmp_path: Path) -> None:
    summary, _ = fit(tmp_path, tiny("gpt2"), LossRecovered(50), max_steps=5)
    (line,) = (tmp_path / "loss_recovered.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 5
    assert summary["metrics"]["val/ce_sae"] == pytest.approx(json.loads(line)["ce_sae"])


@pytest.mark.parametrize(
    "averaging",
    [lambda: EMAWeightAveraging(decay=0.5, use_buffers=False), lambda: StochasticWeightAveraging(1e-2, 1)],
    ids=["EMA", "SWA"],
)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch")
def test_figures_of_averaged_weights_are_those_of_the_file(
    averaging: Callable[[], L.Callback], tiny: Any, tmp_path: Path
) -> None:
    summary, _ = fit(tmp_path, tiny("gpt2"), averaging(), max_epochs=3)
    assert summary["figures"] == summary["last"]
    assert_file_gives_the_figures(summary, tmp_path, tiny("gpt2"))


@pytest.mark.slow
def test_the_time_after_a_validation_is_counted(tiny: Any, tmp_path: Path) -> None:
    summary, _ = fit(tmp_path, tiny("gpt2"), At(8, lambda _: time.sleep(3)), max_steps=9)
    assert summary["seconds"] > 3


# ---- resuming from the last weights


WHERE: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "inside an epoch": ({}, {"max_epochs": 3}, 8),
    "at the end of an epoch": ({}, {"max_epochs": 3}, 6),
    "between accumulations": ({}, {"max_epochs": 3, "accumulate_grad_batches": 3}, 9),
    "of unknown length": ({"max_tokens": None}, {"max_steps": 20}, 8),
    "between validations": ({}, {"max_epochs": 3, "val_check_interval": 2}, 9),
}


class Validations(L.Callback):
    """The step, epoch and FVU of each validation."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, float]] = []

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        fvu = float(trainer.callback_metrics["val/fvu"])
        self.seen.append((trainer.global_step, trainer.current_epoch, fvu))


@pytest.mark.parametrize(
    ("where", "checkpoints"),
    [
        ("inside an epoch", True),
        *(pytest.param(where, False, marks=pytest.mark.slow) for where in WHERE),
        pytest.param("of unknown length", True, marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_the_file_of_a_stopped_run_resumes_bit_for_bit(
    where: str, checkpoints: bool, tiny: Any, tmp_path: Path
) -> None:
    data_options, options, at = WHERE[where]

    def run(name: str, *callbacks: L.Callback, **more: Any) -> tuple[Any, ...]:
        recorder, validations = Recorder(), Validations()
        kept = [keep(tmp_path / name)] if checkpoints else [keep(tmp_path / name, save_top_k=0)]
        summary, run = fit(
            tmp_path / name, tiny("gpt2"), recorder, validations, *kept, *callbacks,
            data_options=data_options, **options, **more,
        )  # fmt: skip
        return summary, run, recorder.batches, validations.seen

    _, whole, batches, validations = run("whole")
    summary, _, first, seen = run("first", At(at, stop))
    assert len(first) == at
    _, again, rest, later = run("again", ckpt_path=summary["last"]["file"])
    assert_same(rest, batches[at:])
    assert [each for each in later if each[0] > seen[-1][0]] == [v for v in validations if v[0] > seen[-1][0]]
    assert again.global_step == whole.global_step
    if data_options.get("max_tokens", 0) is not None:  # otherwise only `max_steps` ends the fit
        assert again.current_epoch == whole.current_epoch
    for name, value in whole.lightning_module.state_dict().items():
        assert torch.equal(value, again.lightning_module.state_dict()[name]), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_the_file_of_an_exception_resumes_bit_for_bit(tiny: Any, tmp_path: Path) -> None:
    whole, cut, rest = Recorder(), Recorder(), Recorder()
    fit(tmp_path / "whole", tiny("gpt2"), whole)
    callbacks = (cut, OnExceptionCheckpoint(tmp_path / "first"), At(8, fail))
    summary, _ = fit(tmp_path / "first", tiny("gpt2"), *callbacks, raises=RuntimeError)
    assert summary["last"]["file"] == str(tmp_path / "first" / "on_exception.ckpt")
    fit(tmp_path / "again", tiny("gpt2"), rest, ckpt_path=summary["last"]["file"])
    assert_same(rest.batches, whole.batches[8:])


# ---- checksums of weights


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((6, 8), torch.float32),
        ((6, 8), torch.bfloat16),
        ((5, 7), torch.float32),
        ((2, 3, 4), torch.int64),
        ((4, 16), torch.uint8),
        ((16,), torch.float32),
        ((), torch.int64),
    ],
)
def test_checksums_of_weights_depend_on_every_bit_and_its_place_alone(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    weights = (100 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    expected = _checksum(weights)
    assert _checksum(weights.clone()) == expected
    content = weights.reshape(-1).view(torch.uint8)
    for byte in range(len(content)):
        for bit in range(8):
            content[byte] ^= 1 << bit
            assert _checksum(weights) != expected, (byte, bit)
            content[byte] ^= 1 << bit
    for dim in range(weights.ndim):
        assert _checksum(weights.roll(1, dim)) != expected, dim
    shifted = torch.cat([weights.new_zeros(1), weights.reshape(-1)])[1:].view(shape)
    assert _checksum(shifted) == expected
    if weights.ndim > 1:
        assert _checksum(weights.mT.contiguous().mT) == expected


def test_weights_are_not_copied_to_the_host_for_their_checksums(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    monkeypatch.setattr(final_weights.zlib, "crc32", lambda content: lengths.append(len(content)) or 0)
    weights = torch.randn(512, 1024)
    _checksum(weights)
    assert sum(lengths) < weights.nbytes / 100
