"""Take over what Lightning's tuners, `LearningRateFinder` and `BatchSizeFinder`, change before or inside a fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from torch.optim.lr_scheduler import LambdaLR


def continue_after_tuner(trainer: Trainer, lrs: Sequence[float]) -> None:
    """Use the learning rates that a `LearningRateFinder` set, and train the epoch before which a tuner ran.

    Lightning gives a found learning rate to the next step only: the schedule returns to the earlier one. After a
    `BatchSizeFinder` it takes the next epoch for a restarted one, and trains at most one batch of it.

    Args:
        trainer: the Trainer, in `on_fit_start` or `on_train_epoch_start` of its module.
        lrs: the peak learning rate of each parameter group.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(callback, LearningRateFinder) for callback in callbacks):
        for config in trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, LambdaLR):
                _set_peaks(config.scheduler, lrs)
    loop = trainer.fit_loop
    tuned = any(isinstance(callback, BatchSizeFinder) for callback in callbacks)
    if tuned and loop.restarting and not loop.restarted_on_epoch_start:
        loop.restarting = loop.epoch_loop.restarting = False


def saved_peaks(checkpoint: Mapping[str, Any]) -> list[float]:
    """The peak learning rate of each parameter group in a checkpoint; empty without a `LambdaLR`."""
    schedules = checkpoint.get("lr_schedulers", [])
    return next((list(state["base_lrs"]) for state in schedules if "lr_lambdas" in state), [])


def refuse_learning_rate_finder(trainer: Trainer) -> None:
    """Refuse to set one found learning rate for several dictionaries.

    Raises:
        ValueError: a `LearningRateFinder` would set it; without `update_attr` it only measures.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
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
