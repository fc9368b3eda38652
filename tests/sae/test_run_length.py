"""Schedules know the number of steps of a fit, from all limits of the Trainer and the data, also after a resume."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from deeplens_lightning.datamodule import ActivationDataModule
from deeplens_lightning.sae import Optimization, SparseAutoencoder
from deeplens_lightning.types import Batch
from tests.support.ranks import launch
from tests.support.texts import texts
from tests.support.training import data, trainer

LR, WARMUP, DECAY = 1e-3, 0.3, 0.4
D, ROWS, BATCH = 8, 80, 16
EPOCH = ROWS // BATCH
"""Batches in a pass over the cache."""


class Rates(L.Callback):
    """Note the learning rate of every optimizer step, and how far the ramps of penalties are at its last batch."""

    def __init__(self) -> None:
        self.rates: dict[int, float] = {}
        self.batches = 0

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Batch, _: int
    ) -> None:
        self.batches += 1
        self.rates[trainer.global_step] = trainer.optimizers[0].param_groups[0]["lr"]


class Watched(SparseAutoencoder):
    """Note the progress of training that penalties are given."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.progress: list[float] = []

    def losses(self, x: torch.Tensor, y: torch.Tensor, progress: float = 1.0) -> Any:
        self.progress.append(progress)
        return super().losses(x, y, progress)


def expected(steps: int) -> list[float]:
    """The learning rates of a fit: a linear rise over 30% of the steps, and a linear fall to 0 over 40%."""
    rise, fall = max(1, round(WARMUP * steps)), max(1, round(DECAY * steps))
    return [LR * min((n + 1) / rise, (steps - n) / fall, 1.0) for n in range(steps)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("cache") / "layers.0.mlp_out.pt"
    torch.save(torch.randn(ROWS, D, generator=torch.Generator().manual_seed(0)), path)
    return str(path)


def cached(cache: str, max_tokens: int | None = None) -> ActivationDataModule:
    return ActivationDataModule(shards=cache, batch_size=BATCH, val_fraction=0.0, max_tokens=max_tokens)


def fit(
    folder: Path, dm: ActivationDataModule, *callbacks: L.Callback, ckpt: Path | None = None, **options: Any
) -> tuple[Rates, Watched, L.Trainer]:
    rates, shares = Rates(), Optimization(warmup=WARMUP, decay=DECAY)
    module = Watched(dm.d_in, 16, k=2, architecture="relu", lr=LR, optimization=shares)
    run = trainer(folder, None, [rates, *callbacks], **options)
    run.fit(module, dm, ckpt_path=ckpt)
    return rates, module, run


def check(rates: Rates, module: Watched, run: L.Trainer) -> None:
    """The learning rates and penalties are those of a fit that ends at exactly this step."""
    steps, first = run.global_step, min(rates.rates)
    assert list(rates.rates) == list(range(first, steps))
    assert list(rates.rates.values()) == pytest.approx(expected(steps)[first:], rel=1e-12)
    assert min(rates.rates.values()) > 0
    assert set(module.progress) == {n / steps for n in range(first, steps)}


class SaveAt(L.Callback):
    """Save a checkpoint after an optimizer step, in the middle of an epoch or at its last batch."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path, self.saved = step, path, False

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and not self.saved:
            self.saved = True  # not whether the file exists: another rank may have written it already
            trainer.save_checkpoint(self.path)


CASES: dict[str, tuple[dict[str, Any], int]] = {
    "accumulation that does not divide an epoch": ({"max_epochs": 6, "accumulate_grad_batches": 4}, 12),
    "epochs before steps": ({"max_epochs": 2, "max_steps": 1000}, 10),
    "steps before epochs": ({"max_epochs": 6, "max_steps": 7}, 7),
    "steps alone, over several epochs": ({"max_steps": 8, "accumulate_grad_batches": 4}, 8),
    "whole passes over a cache": ({"max_epochs": 3}, 15),
    "a share of an epoch": ({"max_epochs": 3, "limit_train_batches": 0.5}, 6),
    "a number of batches": ({"max_epochs": 3, "limit_train_batches": 3, "accumulate_grad_batches": 2}, 6),
    "a limit above what there is": ({"max_epochs": 2, "limit_train_batches": 99}, 10),
    "overfitting": ({"max_epochs": 3, "overfit_batches": 2}, 6),
    "a few batches": ({"fast_dev_run": 3}, 3),
    "a smallest number of epochs": ({"max_epochs": 2, "min_epochs": 2, "min_steps": 1}, 10),
}


@pytest.mark.parametrize("case", CASES)
def test_a_fit_takes_the_planned_steps(case: str, cache: str, tmp_path: Path) -> None:
    options, steps = CASES[case]
    rates, module, run = fit(tmp_path, cached(cache), **options)
    assert run.global_step == steps
    check(rates, module, run)
    assert module.planned_tokens == rates.batches * BATCH
    assert module.dead_after_tokens == rates.batches * BATCH // 10


@pytest.mark.parametrize("stop", [1, 3, 4, 5])
def test_a_resumed_fit_has_the_schedule_of_an_uninterrupted_one(
    stop: int, cache: str, tmp_path: Path
) -> None:
    options = {"max_epochs": 3, "accumulate_grad_batches": 2, "max_steps": 1000}
    whole, module, run = fit(tmp_path, cached(cache), SaveAt(stop, tmp_path / "a.ckpt"), **options)
    rest, resumed, again = fit(tmp_path, cached(cache), ckpt=tmp_path / "a.ckpt", **options)
    check(rest, resumed, again)
    assert again.global_step == run.global_step == 9
    assert rest.rates == {step: rate for step, rate in whole.rates.items() if step >= stop}
    assert resumed.planned_tokens == module.planned_tokens == 15 * BATCH
    assert torch.equal(resumed.W_enc, module.W_enc)


class SaveAfterEpoch(SaveAt):
    """Save a checkpoint at the end of the epoch in which a step is the last one."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        pass

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        super().on_train_batch_end(trainer)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize(
    "limits", [{"max_epochs": 3}, {"max_epochs": 3, "max_steps": 1000}, {"max_steps": 8}]
)
def test_a_fit_resumed_between_epochs_has_the_schedule_of_an_uninterrupted_one(
    limits: dict[str, Any], every: int, cache: str, tmp_path: Path
) -> None:
    options = limits | {"accumulate_grad_batches": every}
    stop = -(-EPOCH // every)
    whole, module, run = fit(tmp_path, cached(cache), SaveAfterEpoch(stop, tmp_path / "a.ckpt"), **options)
    rest, resumed, again = fit(tmp_path, cached(cache), ckpt=tmp_path / "a.ckpt", **options)
    check(rest, resumed, again)
    assert again.global_step == run.global_step == min(3 * stop, limits.get("max_steps", 1000))
    assert rest.rates == {step: rate for step, rate in whole.rates.items() if step >= stop}
    assert resumed.planned_tokens == module.planned_tokens
    assert torch.equal(resumed.W_enc, module.W_enc)


def test_a_finished_fit_that_goes_on_is_planned_anew(cache: str, tmp_path: Path) -> None:
    """The restored learning rate is 0, the end of the shorter fit."""
    fit(tmp_path, cached(cache), SaveAt(5, tmp_path / "a.ckpt"), max_epochs=1)
    rates, module, run = fit(tmp_path, cached(cache), ckpt=tmp_path / "a.ckpt", max_epochs=3)
    assert run.global_step == 15
    check(rates, module, run)


@pytest.mark.filterwarnings("ignore:When using `Trainer.accumulate_grad_batches")  # `optimizer_step` is ours
def test_an_accumulation_that_changes_is_counted_exactly(cache: str, tmp_path: Path) -> None:
    rates, module, run = fit(
        tmp_path, cached(cache), GradientAccumulationScheduler({1: 2, 3: 5}), max_epochs=5
    )
    assert run.global_step == 5 + 3 + 3 + 1 + 1
    check(rates, module, run)
    assert module.planned_tokens == 25 * BATCH


UNKNOWN: dict[str, tuple[dict[str, Any], str]] = {
    "epochs of unknown length": ({"max_epochs": 1}, "max_epochs with epochs of unknown length.*max_tokens"),
    "time": ({"max_time": "00:00:00:01"}, "max_time.*give max_steps for"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_a_length_that_cannot_be_known_needs_no_schedule_and_is_said(
    case: str, tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options, said = UNKNOWN[case]
    with caplog.at_level(logging.INFO):
        rates, module, _ = fit(tmp_path, data(tiny("gpt2"), texts(4)), EndAfter(3), **options)
    assert list(rates.rates.values())[:3] == pytest.approx([LR * n / 1000 for n in (1, 2, 3)])
    assert set(module.progress) == {1.0}
    assert module.planned_tokens is None
    (line,) = [line for line in caplog.messages if "optimizer steps is not known" in line]
    assert re.search(said, line)


def test_a_length_that_may_be_shorter_is_planned_and_said(
    tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        rates, module, run = fit(tmp_path, data(tiny("gpt2"), texts(4)), max_epochs=9, max_steps=6)
    check(rates, module, run)
    assert "max_epochs with epochs of unknown length may end training earlier" in caplog.text


class EndAfter(L.Callback):
    """End training after some steps, as a limit does that is not known before."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.steps


LIMITS = st.fixed_dictionaries(
    {},
    optional={
        "max_epochs": st.integers(1, 4),
        "max_steps": st.integers(1, 25),
        "limit_train_batches": st.sampled_from([0.4, 0.7, 1, 2, 3, 4, 99]),
        "overfit_batches": st.sampled_from([2, 3, 0.5]),
        "accumulate_grad_batches": st.integers(1, 7),
        "min_epochs": st.integers(1, 4),
    },
).filter(lambda limits: limits.keys() & {"max_epochs", "max_steps"})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:When using `Trainer.accumulate_grad_batches")
@given(
    limits=LIMITS,
    schedule=st.none() | st.dictionaries(st.integers(0, 3), st.integers(1, 4), min_size=1),
    max_tokens=st.none() | st.integers(2 * BATCH, 8 * BATCH),
    stop=st.integers(1, 12),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_for_any_limits_the_planned_steps_are_the_steps_taken(
    limits: dict[str, Any],
    schedule: dict[int, int] | None,
    max_tokens: int | None,
    stop: int,
    cache: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("run")
    callbacks: list[L.Callback] = []
    if schedule and limits.setdefault("accumulate_grad_batches", 1) == 1:
        callbacks = [GradientAccumulationScheduler(dict(schedule))]
    whole, module, run = fit(
        folder, cached(cache, max_tokens), SaveAt(stop, folder / "a.ckpt"), *callbacks, **limits
    )
    check(whole, module, run)
    assert module.planned_tokens == whole.batches * BATCH
    if stop < run.global_step:
        rest, resumed, again = fit(
            folder, cached(cache, max_tokens), *callbacks, ckpt=folder / "a.ckpt", **limits
        )
        check(rest, resumed, again)
        assert again.global_step == run.global_step
        assert resumed.planned_tokens == module.planned_tokens


def on_rank(rank: int, ranks: int, folder: Path, cache: str) -> None:
    options = {"max_epochs": 4, "strategy": "ddp", "devices": ranks}
    rates, module, run = fit(folder, cached(cache), SaveAt(4, folder / "a.ckpt"), **options)
    assert run.global_step == 4 * 3
    check(rates, module, run)
    assert module.planned_tokens == 12 * BATCH * ranks
    rates, module, run = fit(folder, cached(cache), ckpt=folder / "a.ckpt", **options)
    check(rates, module, run)


@pytest.mark.slow
def test_ranks_take_the_planned_steps_also_if_one_of_them_continues_alone(cache: str, tmp_path: Path) -> None:
    launch(2, on_rank, tmp_path, cache)
    rates, module, run = fit(tmp_path, cached(cache), ckpt=tmp_path / "a.ckpt", max_epochs=4)
    assert run.global_step == 4 + 4 + 5 + 5
    check(rates, module, run)
