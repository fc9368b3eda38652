"""Check that the metrics which callbacks monitor are measured."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint


def check_monitors(trainer: Trainer, training: Sequence[str]) -> None:
    """Refuse to monitor held-out metrics in a fit without validation, before the first step.

    Lightning would say so at the end of an epoch, or never.

    Args:
        trainer: the Trainer, in `on_train_epoch_start`, when it knows the number of held-out batches.
        training: metrics of training batches to name in the message.

    Raises:
        ValueError: an `EarlyStopping` or `ModelCheckpoint` monitors a metric under "val/", and there is no validation.
    """
    known = trainer.val_dataloaders is not None
    if trainer.limit_val_batches != 0 and (not known or sum(trainer.num_val_batches) > 0):
        return
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        monitored = callback.monitor if isinstance(callback, EarlyStopping | ModelCheckpoint) else None
        if monitored is not None and monitored.startswith("val/"):
            raise ValueError(
                f"{type(callback).__name__}(monitor={monitored!r}) would never find a value: there is no validation, "
                "because no documents are held out (val_fraction, val_rows) or limit_val_batches=0. This fit logs "
                f"{', '.join(training)}, and in place of fvu also loss, l0 and dead_fraction"
            )
