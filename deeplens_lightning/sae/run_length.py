"""The length of a fit in optimizer steps and batches, from all limits together, and the schedules that depend on it."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, Timer

from deeplens_lightning.activation_data import callbacks_of
from deeplens_lightning.sae.schedule import OPEN_ENDED_WARMUP, Optimization, WarmupDecay

UNLIMITED = sys.maxsize


@dataclass(frozen=True, kw_only=True)
class RunLength:
    """Length of a fit, counted from step 0, also if the fit continues from a checkpoint.

    Attributes:
        steps: number of optimizer steps; None if it is not known.
        batches: number of batches of each rank in these steps; None if it is not known.
        note: a sentence for the user if training may end at another step; None if not.
    """

    steps: int | None
    batches: int | None
    note: str | None = None


def plan(trainer: Trainer, optimizations: Sequence[Optimization]) -> RunLength:
    """Compute the length of a fit, and adjust the learning rate to it if the Trainer uses a `WarmupDecay`.

    Args:
        trainer: a Trainer in `on_train_start` or a later hook.
        optimizations: the settings of the schedule, one for each parameter group.
    """
    for scheduler in _accumulation_schedulers(trainer):
        scheduler.on_train_epoch_start(
            trainer
        )  # not called by Lightning where a fit continues inside an epoch
    length = run_length(trainer)
    for config in trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, WarmupDecay):
            config.scheduler.plan(length.steps, optimizations)
    return length


def run_length(trainer: Trainer) -> RunLength:
    """The length of a fit: the smallest of all limits, counted as Lightning counts. `EarlyStopping` may end it earlier.

    Before `on_train_start` Lightning computes the number of batches in an epoch from the length of the loader,
    `limit_train_batches`, `overfit_batches` and `fast_dev_run`. An epoch's last batch ends an accumulation.
    `trainer.estimated_stepping_batches` is not used: read in `configure_optimizers`, it builds the dataloaders before
    their state is restored.

    Args:
        trainer: a Trainer in `on_train_start` or a later hook.
    """
    loop: Any = trainer.fit_loop
    done, trained = trainer.global_step, loop.epoch_loop.batch_progress
    most = UNLIMITED if trainer.max_steps < 0 else trainer.max_steps
    counted = not math.isinf(trainer.num_training_batches)
    endless = most == UNLIMITED and (loop.max_epochs < 0 or not counted)
    note = _note(trainer, endless=endless, uncounted=loop.max_epochs >= 0 and not counted)
    if endless:
        return RunLength(steps=None, batches=None, note=note)
    if not counted:
        every, changes = trainer.accumulate_grad_batches, bool(_accumulation_schedulers(trainer))
        batches = trained.total.processed + (most - done) * every - trained.current.processed % every
        return RunLength(steps=most, batches=None if changes else batches, note=note)
    left, batches, in_epoch = most - done, trained.total.processed, int(trainer.num_training_batches)
    for epochs, begun, every in _epochs(trainer, in_epoch):
        steps = math.ceil(in_epoch / every) - begun // every if begun < in_epoch else 0
        whole = min(epochs, left // steps) if steps else epochs
        left -= whole * steps
        batches += whole * (in_epoch - begun)
        if whole < epochs:  # `max_steps` ends training inside an epoch
            batches += left * every - begun % every if left else 0
            left = 0
            break
    return RunLength(steps=most - left, batches=batches, note=note)


def _epochs(trainer: Trainer, in_epoch: int) -> Iterator[tuple[int, int, int]]:
    """The rest of training: number of equal epochs in a row, batches that are done in them, and their accumulation."""
    loop: Any = trainer.fit_loop
    first: int = loop.epoch_progress.current.processed
    if loop.epoch_progress.current.started > first:
        begun: int = loop.epoch_loop.batch_progress.current.processed
        yield 1, min(in_epoch, begun), trainer.accumulate_grad_batches
        first += 1
    last = UNLIMITED if loop.max_epochs < 0 else loop.max_epochs
    schedulers = _accumulation_schedulers(trainer)
    accumulation: Mapping[int, int] = {0: trainer.accumulate_grad_batches}
    if schedulers:
        accumulation = schedulers[0].scheduling
    changes = [epoch for epoch in sorted(accumulation) if first < epoch < last]
    for start, end in pairwise([first, *changes, last]):
        yield end - start, 0, accumulation[max(epoch for epoch in accumulation if epoch <= start)]


def _accumulation_schedulers(trainer: Trainer) -> list[GradientAccumulationScheduler]:
    return [each for each in callbacks_of(trainer) if isinstance(each, GradientAccumulationScheduler)]


def _note(trainer: Trainer, *, endless: bool, uncounted: bool) -> str | None:
    """Say which limits have an unknown number of steps, what follows, and what to give instead."""
    timers = [each for each in callbacks_of(trainer) if isinstance(each, Timer)]
    timed = any(timer.time_remaining() is not None for timer in timers)
    limits = ["max_time"] * timed + ["max_epochs with epochs of unknown length"] * uncounted
    if endless:
        fix = "max_steps, or max_tokens of the data module," if uncounted else "max_steps"
        return (
            f"the number of optimizer steps is not known ({' and '.join(limits) or 'training has no limit'}): the "
            f"learning rate rises for {OPEN_ENDED_WARMUP} steps and does not fall, and penalties have their full weight "
            f"from the first step; give {fix} for a planned schedule"
        )
    if limits:
        return (
            f"the schedules are planned for the other limits: {' or '.join(limits)} may end training earlier, before "
            "the learning rate has fallen"
        )
    return None
