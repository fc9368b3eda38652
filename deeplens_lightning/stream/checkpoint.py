"""The data module's part of a checkpoint: its shape, and whether a run may go on from it.

Primitives and tensors only, so that it loads with `weights_only=True`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lightning.pytorch import Trainer

STATE_VERSION = 1

Table = list[tuple[dict[str, Any], int, int]]
"""Of every rank: a position, and the batches and rows served since."""


def check_version(state: Mapping[str, Any]) -> None:
    """Refuse a state that this version does not know.

    Raises:
        ValueError: with what to do.
    """
    if state.get("version") != STATE_VERSION:
        raise ValueError(
            f"the checkpoint's data state has version {state.get('version')}, this release reads {STATE_VERSION}: "
            "go on with the release that wrote it, or start anew with SparseAutoencoder.load_from_checkpoint"
        )


def differences(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What is not the same, one sentence each."""
    return [
        f"{key}: {saved.get(key, '(nothing)')} in the checkpoint, {now.get(key, '(nothing)')} now"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key)
    ]


def check_fingerprint(saved: Mapping[str, str], now: Mapping[str, str], unused: Collection[str] = ()) -> None:
    """Refuse to go on with other data than before.

    Args:
        saved: of the checkpoint.
        now: of this run.
        unused: what may differ all the same.

    Raises:
        ValueError: naming each difference.
    """
    found = differences(
        *({key: value for key, value in each.items() if key not in unused} for each in (saved, now))
    )
    if found:
        raise ValueError(
            "this checkpoint was taken on other data; going on would not continue it.\n  "
            + "\n  ".join(found)
            + "\nUse the same configuration, or give resume_anyway=True to go on at the same place of the new data"
        )


def lost_in_accumulation(trainer: Trainer) -> str | None:
    """What Lightning itself does not restore from a checkpoint inside gradient accumulation, as a sentence.

    Args:
        trainer: whose loops were restored and have not run.
    """
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    every = trainer.accumulate_grad_batches
    inside = progress.current.processed % every
    if not inside:
        return None
    if not progress.is_last_batch:
        return (
            f"this checkpoint was taken {inside} batch(es) into an accumulation of {every}: Lightning saves no "
            "gradients, so theirs are lost. The data go on exactly; save where global_step changes to lose nothing"
        )
    if trainer.fit_loop.max_batches == float("inf"):
        return (
            f"this checkpoint was taken on the last batch of an epoch of unknown length, {inside} batch(es) into "
            f"an accumulation of {every}: Lightning goes on counting from there, so accumulations of the next epoch "
            "begin elsewhere. The data go on exactly; give max_tokens to make epochs of a known length"
        )
    return None


def served_table(position: Mapping[str, Any]) -> Table:
    """How far each rank had come when the checkpoint was taken, from `ActivationLoader.position`."""
    since, batch_size = position["since"], position["batch_size"]
    return [
        (
            rank["position"],
            rank["step"] + since,
            rank["step"] * batch_size + min(since * batch_size, rank["rows"]),
        )
        for rank in position["ranks"]
    ]
