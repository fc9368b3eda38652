"""Check that the metrics which callbacks monitor are measured."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from deeplens_lightning.activation_data import callbacks_of


def check_monitors(trainer: Trainer, training: Sequence[str]) -> None:
    """Refuse to monitor held-out metrics in a fit without validation, before the first step.

    Lightning would say so at the end of an epoch, or never.

    Args:
        trainer: the Trainer, in `on_train_epoch_start`, when it knows the number of held-out batches.
        training: metrics of training batches to name in the message.

    Raises:
        ValueError: an `EarlyStopping` or `ModelCheckpoint` monitors a metric under "val/", and there is no validation.
    """
    if _validates(trainer):
        return
    for callback in callbacks_of(trainer):
        monitored = callback.monitor if isinstance(callback, EarlyStopping | ModelCheckpoint) else None
        if monitored is not None and monitored.startswith("val/"):
            raise ValueError(
                f"{type(callback).__name__}(monitor={monitored!r}) would never find a value: there is no validation, "
                "because no documents are held out (val_fraction, val_rows) or limit_val_batches=0. This fit logs "
                f"{', '.join(training)}, and in place of fvu also loss, l0 and dead_fraction"
            )


def warn_of_missing_metrics(trainer: Trainer) -> None:
    """Warn of a `ModelCheckpoint` that saves by steps or time and monitors a metric that training does not log.

    Lightning puts off what it would save until the next validation, or for ever, and says nothing.

    Args:
        trainer: the Trainer, at the end of a step that logs metrics.
    """
    known = [*sorted(trainer.callback_metrics), "epoch", "step"]
    until, more = "", ""
    if _validates(trainer):
        until, more = " before a validation", "; a validation adds those under val/"
    for callback in callbacks_of(trainer):
        if not isinstance(callback, ModelCheckpoint) or callback.monitor is None:
            continue
        in_steps = callback._every_n_train_steps > 0 or callback._train_time_interval is not None
        held_out = callback.monitor.startswith("val/")  # Lightning refuses these at the end of a validation
        if in_steps and not held_out and callback.monitor not in known:
            rank_zero_warn(
                f"ModelCheckpoint(monitor={callback.monitor!r}) saves nothing{until}: up to step {trainer.global_step} "
                f"training has logged no such metric, but {', '.join(known)}{more}"
            )


def _validates(trainer: Trainer) -> bool:
    """Whether the fit has held-out batches, as far as it is known yet."""
    known = trainer.val_dataloaders is not None
    return trainer.limit_val_batches != 0 and (not known or sum(trainer.num_val_batches) > 0)
