"""The data module's part of a checkpoint: its shape, and whether a run may continue from it.

Primitives and tensors only, so that it loads with `weights_only=True`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer

from deeplens_lightning.normalization import Scaling, scalings_state
from deeplens_lightning.stream.measured_statistics import Statistics
from deeplens_lightning.types import STATE_VERSION, RankProgress, stream_position


@dataclass(frozen=True, kw_only=True)
class LoaderPosition:
    """How far training has come in the data: the same on every rank.

    Attributes:
        ranks: of every rank, a position, the batches served from there up to the last agreement of the ranks, and
            the rows in the batches that were certain then.
        since: batches trained on since that agreement.
        batch_size: rows a batch of each rank.
        epoch_batches: batches of the data epoch that were trained on.
        in_epoch: batches of the Trainer's epoch that were trained on.
        rows_dropped: rows that earlier epochs could not serve, over all ranks.
    """

    ranks: tuple[RankProgress, ...]
    since: int
    batch_size: int
    epoch_batches: int
    in_epoch: int
    rows_dropped: int

    def table(self) -> list[RankProgress]:
        """The progress of each rank when the checkpoint was taken."""
        return [
            RankProgress(
                position=rank.position,
                step=rank.step + self.since,
                rows=rank.step * self.batch_size + min(self.since * self.batch_size, rank.rows),
            )
            for rank in self.ranks
        ]

    def to_state(self) -> dict[str, Any]:
        """As JSON-like values."""
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
    """Everything that a checkpoint keeps of a data module.

    Attributes:
        fingerprint: what must not change when the run continues, by name.
        position: how far training has come; None before the first batch.
        buffer_rows: rows being mixed; None without a buffer.
        statistics: normalisation and norm limits; None where they were not measured.
    """

    fingerprint: Mapping[str, str]
    position: LoaderPosition | None
    buffer_rows: int | None
    statistics: Statistics | None

    def to_state(self) -> dict[str, Any]:
        """As JSON-like values and tensors."""
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
            ValueError: the state has a version that is not known here; with what to do.
        """
        if state.get("version") != STATE_VERSION:
            raise ValueError(
                f"the checkpoint's data state has version {state.get('version')}, this release reads {STATE_VERSION}: "
                "continue with the release that wrote it, or start again with SparseAutoencoder.load_from_checkpoint"
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
    """What is not the same, one sentence each."""
    return [
        f"{key}: {saved.get(key, '(nothing)')} in the checkpoint, {now.get(key, '(nothing)')} now"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key)
    ]


def check_fingerprint(saved: Mapping[str, str], now: Mapping[str, str], unused: Collection[str] = ()) -> None:
    """Refuse to continue with other data than before.

    Args:
        saved: of the checkpoint.
        now: of this run.
        unused: names that may differ.

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
