"""The number of optimizer steps that a fit will take, for the learning rate schedule."""

from __future__ import annotations

from lightning.pytorch import Trainer

from deeplens_lightning.activation_data import activation_data, data_parallel_ranks


def planned_steps(trainer: Trainer) -> int | None:
    """Number of optimizer steps that this fit will take; None if it is unlimited or unknown.

    Computed from the Trainer's limits and the data module's `max_tokens`. `trainer.estimated_stepping_batches`
    is not used: it builds the dataloaders before their state is restored.
    """
    if trainer.max_steps is not None and trainer.max_steps >= 0:
        return int(trainer.max_steps)
    if trainer.max_epochs is None or trainer.max_epochs < 0:
        return None
    batches = _batches_per_epoch(trainer)
    return (
        None if batches is None else max(1, batches * trainer.max_epochs // trainer.accumulate_grad_batches)
    )


def _batches_per_epoch(trainer: Trainer) -> int | None:
    data = activation_data(trainer)
    limits = [trainer.limit_train_batches] if isinstance(trainer.limit_train_batches, int) else []
    if data.max_tokens is not None and data.batch_size is not None:
        limits.append(data.max_tokens // (data.batch_size * data_parallel_ranks(trainer)))
    return min(limits) if limits else None
