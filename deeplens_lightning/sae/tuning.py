"""Take over what Lightning's tuners, `LearningRateFinder` and `BatchSizeFinder`, change before or inside a fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from torch.optim.lr_scheduler import LambdaLR

from deeplens_lightning.activation_data import callbacks_of


def adopt_learning_rates(trainer: Trainer, lrs: Sequence[float]) -> None:
    """Use the learning rates that a `LearningRateFinder` set for the whole schedule.

    Lightning uses them for one step; then the schedule returns to the earlier ones.

    Args:
        trainer: the Trainer.
        lrs: the peak learning rate of each parameter group.
    """
    if any(isinstance(callback, LearningRateFinder) for callback in callbacks_of(trainer)):
        for config in trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, LambdaLR):
                _set_peaks(config.scheduler, lrs)


def begin_epoch_after_tuner(trainer: Trainer, resumed_step: int | None) -> None:
    """Train all of an epoch before which a tuner ran.

    Lightning takes that epoch, and the first one of the trials of a `LearningRateFinder`, for an epoch of a resumed fit
    that is done already.

    Args:
        trainer: the Trainer, in `on_train_epoch_start` of its module.
        resumed_step: the step of the checkpoint that the fit continues from; None if there is none.

    Raises:
        ValueError: a tuner ran before the first step of a resumed fit, and Lightning forgot the step of the checkpoint.
    """
    if resumed_step is not None and trainer.global_step < resumed_step:
        raise ValueError(
            f"the checkpoint is from step {resumed_step}, but a LearningRateFinder or BatchSizeFinder ran before the fit "
            f"continued, and Lightning would count the steps from {trainer.global_step}: resume without it, with the "
            "value that it found"
        )
    loop = trainer.fit_loop
    sized = any(isinstance(callback, BatchSizeFinder) for callback in callbacks_of(trainer))
    if trainer.global_step != resumed_step or (sized and not loop.restarted_on_epoch_start):
        loop.epoch_loop.restarting = False


def saved_peaks(checkpoint: Mapping[str, Any]) -> list[float]:
    """The peak learning rate of each parameter group in a checkpoint; empty without a `LambdaLR`."""
    schedules = checkpoint.get("lr_schedulers", [])
    return next((list(state["base_lrs"]) for state in schedules if "lr_lambdas" in state), [])


def refuse_learning_rate_finder(trainer: Trainer) -> None:
    """Refuse to set one found learning rate for several dictionaries.

    Raises:
        ValueError: a `LearningRateFinder` would set it; without `update_attr` it only measures.
    """
    for callback in callbacks_of(trainer):
        if isinstance(callback, LearningRateFinder) and callback._update_attr:
            raise ValueError(
                "a grid has no lr to find, because each of its SAEs has its own: find it with one SparseAutoencoder and "
                'give it as shared={"lr": ...}, or only measure with update_attr=False'
            )


def _set_peaks(schedule: LambdaLR, peaks: Sequence[float]) -> None:
    schedule.base_lrs = list(peaks)
    for group, peak, factor in zip(schedule.optimizer.param_groups, peaks, schedule.lr_lambdas, strict=True):
        group["initial_lr"] = peak
        group["lr"] = peak * factor(schedule.last_epoch)
