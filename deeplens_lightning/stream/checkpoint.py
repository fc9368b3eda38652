"""The data module's part of a checkpoint: write it, read it, and check whether a run can continue from it.

It contains only numbers, strings, lists, dicts and tensors, so that it loads with `weights_only=True`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer

from deeplens_lightning.normalization import Scaling, scalings_state
from deeplens_lightning.shards.format import ADDED_ENTRIES
from deeplens_lightning.stream.measured_statistics import Statistics
from deeplens_lightning.types import STATE_VERSION, RankProgress, stream_position


@dataclass(frozen=True, kw_only=True)
class LoaderPosition:
    """How far training has come in the data; the same object on every rank.

    Now and then the ranks agree on a number of batches that each of them can serve (`ActivationLoader`).

    Attributes:
        ranks: for every rank, a position in its stream, the number of batches from there to the last agreement, and
            the number of rows in the batches that the rank could guarantee at that agreement.
        since: number of batches trained on since that agreement.
        batch_size: rows per batch of each rank.
        epoch_batches: number of batches of the data epoch trained on.
        in_epoch: number of batches of the Trainer's epoch trained on.
        rows_dropped: number of rows that earlier epochs could not serve, the sum over all ranks.
    """

    ranks: tuple[RankProgress, ...]
    since: int
    batch_size: int
    epoch_batches: int
    in_epoch: int
    rows_dropped: int

    def table(self) -> list[RankProgress]:
        """The progress of each rank at the time of the checkpoint."""
        return [
            RankProgress(
                position=rank.position,
                step=rank.step + self.since,
                rows=rank.step * self.batch_size + min(self.since * self.batch_size, rank.rows),
            )
            for rank in self.ranks
        ]

    def to_state(self) -> dict[str, Any]:
        """Convert to JSON-like values, for a checkpoint."""
        return {
            "ranks": [
                {"position": rank.position.to_state(), "step": rank.step, "rows": rank.rows}
                for rank in self.ranks
            ],
            "since": self.since,
            "batch_size": self.batch_size,
            "epoch_batches": self.epoch_batches,
            "in_epoch": self.in_epoch,
            "rows_dropped": self.rows_dropped,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> LoaderPosition:
        """The inverse of `to_state`."""
        ranks = tuple(
            RankProgress(position=stream_position(rank["position"]), step=rank["step"], rows=rank["rows"])
            for rank in state["ranks"]
        )
        return cls(**{**state, "ranks": ranks})


@dataclass(frozen=True, kw_only=True)
class DataState:
    """Everything that a checkpoint stores for a data module.

    Attributes:
        fingerprint: what must be the same when the run continues: name to value.
        position: how far training has come; None before the first batch.
        buffer_rows: number of slots of the shuffle buffer; None without a buffer.
        statistics: normalisation and norm limits; None if they were not measured.
    """

    fingerprint: Mapping[str, str]
    position: LoaderPosition | None
    buffer_rows: int | None
    statistics: Statistics | None

    def to_state(self) -> dict[str, Any]:
        """Convert to JSON-like values and tensors, for a checkpoint."""
        measured = self.statistics
        return {
            "version": STATE_VERSION,
            "fingerprint": dict(self.fingerprint),
            "position": self.position.to_state() if self.position else None,
            "buffer_rows": self.buffer_rows,
            "scalings": scalings_state(measured.scalings) if measured else {},
            "max_norms": dict(measured.max_norms) if measured else {},
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> DataState:
        """The inverse of `to_state`.

        Raises:
            ValueError: the state was written with another version of the format.
        """
        if state.get("version") != STATE_VERSION:
            raise ValueError(
                f"the checkpoint's data state has version {state.get('version')}, this release reads version "
                f"{STATE_VERSION}: continue with the release that wrote it, or load only the SAE with "
                "SparseAutoencoder.load_from_checkpoint and start a new run"
            )
        scalings = {name: Scaling.from_state_dict(x) for name, x in state["scalings"].items()}
        max_norms = dict(state["max_norms"])
        return cls(
            fingerprint=state["fingerprint"],
            position=LoaderPosition.from_state(state["position"]) if state["position"] else None,
            buffer_rows=state["buffer_rows"],
            statistics=Statistics(scalings=scalings, max_norms=max_norms) if scalings else None,
        )


def differences(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """List the names whose values differ, each as a line of text; a missing one of `ADDED_ENTRIES` does not differ."""
    return [
        f"{key}: {saved.get(key, '(nothing)')} in the checkpoint, {now.get(key, '(nothing)')} now"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key) and (key in saved or key not in ADDED_ENTRIES)
    ]


def check_fingerprint(saved: Mapping[str, str], now: Mapping[str, str], unused: Collection[str] = ()) -> None:
    """Check that a run has the same data as a checkpoint.

    Args:
        saved: fingerprint in the checkpoint.
        now: fingerprint of this run.
        unused: names that may differ.

    Raises:
        ValueError: the fingerprints differ; the message lists every difference.
    """
    found = differences(
        *({key: value for key, value in each.items() if key not in unused} for each in (saved, now))
    )
    if found:
        raise ValueError(
            "this checkpoint was taken on other data, so the run cannot be resumed exactly:\n  "
            + "\n  ".join(found)
            + "\nUse the configuration of the checkpoint, or give resume_anyway=True to continue at the same position "
            "in the new data"
        )


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
