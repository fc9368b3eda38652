"""Move a loader to the position of a checkpoint, and refuse a checkpoint from which the data cannot continue exactly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NoReturn

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from deeplens_lightning.stream.checkpoint import DataState
from deeplens_lightning.stream.loader import ActivationLoader
from deeplens_lightning.stream.trained_batches import is_fitting
from deeplens_lightning.types import Placement


def continue_from(
    state: DataState, loader: ActivationLoader, trainer: Trainer | None, placement: Placement, anyway: bool
) -> None:
    """Move a loader to the position of a checkpoint, which may come from another number of ranks or batch size.

    Args:
        state: the state in the checkpoint.
        loader: the new loader.
        trainer: the Trainer; None without one.
        placement: the ranks.
        anyway: continue also where the data are not those of the checkpoint.

    Raises:
        ValueError: the state has no position although the run has trained, or one beyond the data or of another order.
    """
    position = state.position
    if position is None:
        if trainer is not None and not anyway:
            _refuse_lost_position(trainer)
        return
    recorded = state.fingerprint.get("batch_size", str(position.batch_size))
    if recorded != str(position.batch_size) and not anyway:
        raise ValueError(
            f"the checkpoint has a position in batches of {position.batch_size} rows, and says batch_size={recorded}: "
            "take another checkpoint, or give resume_anyway=True to accept it"
        )
    known_length = bool(loader.batches_per_epoch or loader.known_length)
    if trainer is not None and (lost := lost_in_accumulation(trainer, known_length)):
        rank_zero_warn(lost)
    table = [
        replace(progress, position=loader.stream.checked(progress.position, progress.step, anyway=anyway))
        for progress in position.table()
    ]
    if len(table) == placement.ranks and position.batch_size == loader.batch_size:
        here = table[placement.rank]
        loader.go_to(here.position, here.step, position)
        return
    where, again = loader.stream.rescaled(table)
    in_epoch = position.in_epoch * len(table) * position.batch_size // (placement.ranks * loader.batch_size)
    loader.go_to(where, 0, replace(position, since=0, epoch_batches=0, in_epoch=in_epoch))
    rank_zero_info(
        f"continuing with {placement.ranks} rank(s) and batches of {loader.batch_size} rows a run of {len(table)} "
        f"rank(s) and batches of {position.batch_size} rows: {again} rows are served again"
    )


def continue_epochs(trainer: Trainer) -> None:
    """Count the epochs of a checkpoint so that a fit trains what it would have trained without an interruption.

    In a checkpoint from the end of an epoch, Lightning counts this epoch as trained. With `max_steps` it runs an epoch of
    one batch after it, or of none; and it also counts an epoch that a stop has cut short.

    Args:
        trainer: a Trainer whose loops were restored from a checkpoint and have not run yet.
    """
    loop: Any = trainer.fit_loop
    current, total = loop.epoch_progress.current, loop.epoch_progress.total
    if not 0 < total.started == total.processed:
        return  # inside an epoch that is not counted
    if loop.epoch_loop.batch_progress.is_last_batch:
        current.completed, total.completed = current.processed, total.processed
        loop.epoch_loop.restarting = False
    elif total.ready == total.started:
        for progress in (current, total):
            progress.processed = progress.completed = progress.processed - 1
        loop.restarting = True


def lost_in_accumulation(trainer: Trainer, known_length: bool) -> str | None:
    """A warning if the checkpoint was taken in the middle of a gradient accumulation, which Lightning cannot restore.

    Args:
        trainer: a Trainer whose loops were restored from a checkpoint and have not run yet.
        known_length: whether the training loader has a length.

    Returns:
        The text of the warning; None if nothing is lost.
    """
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    every = trainer.accumulate_grad_batches
    inside = progress.current.processed % every
    if not inside:
        return None
    if not progress.is_last_batch:
        return (
            f"this checkpoint was taken {inside} batch(es) into an accumulation of {every}: Lightning saves no "
            "gradients, so those of these batches are lost. The data continue exactly. To lose nothing, save a "
            "checkpoint only after an optimizer step, when global_step changes"
        )
    if not known_length and isinstance(trainer.limit_train_batches, float):
        return (
            f"this checkpoint was taken on the last batch of an epoch of unknown length, {inside} batch(es) into "
            f"an accumulation of {every}: Lightning continues to count from there, so accumulations of the next epoch "
            "begin at other batches. The data continue exactly. Give max_tokens to make epochs of a known length"
        )
    return None


def refuse_resume(trainer: Trainer | None, name: str) -> None:
    """Raise a ValueError if the Trainer resumes from a checkpoint that has no state of this data module."""
    if trainer is not None and is_fitting(trainer) and trainer.ckpt_path:
        raise ValueError(
            f"{trainer.ckpt_path} holds no state of {name}, so the data would start from the beginning: was the data "
            "module renamed or subclassed? To continue training with the data from the beginning give "
            "resume_anyway=True; to load only the model use load_from_checkpoint"
        )


def refuse_loading(name: str, checkpoint_path: Any) -> NoReturn:
    """Raise a NotImplementedError for `load_from_checkpoint` of a data module, and say what to call instead.

    Args:
        name: name of the data module's class.
        checkpoint_path: path of the checkpoint, for the message.
    """
    raise NotImplementedError(
        f"a checkpoint holds a position in the data, but neither the model nor the text of a data module: make "
        f"{name}(...) with the settings of the run, and continue with trainer.fit(module, datamodule, "
        f"ckpt_path={str(checkpoint_path)!r}); to load only the SAE use SparseAutoencoder.load_from_checkpoint"
    )


def _refuse_lost_position(trainer: Trainer) -> None:
    """Raise a ValueError if a checkpoint of a Trainer that has trained holds a state from before the first batch."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    trained: int = progress.total.processed
    if is_fitting(trainer) and trained:
        raise ValueError(
            f"{trainer.ckpt_path} was saved after {trained} batches and its data state has no position, so the data "
            "would start from the beginning: take another checkpoint, or give resume_anyway=True to accept it"
        )
