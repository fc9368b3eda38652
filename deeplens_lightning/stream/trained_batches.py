"""Count the batches that a Trainer has trained on, and look up the provenance of a batch.

In: the progress counters of Lightning's loops. Out: the number of served batches that were not trained on, and the
provenance of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.weak import WeakIdKeyDictionary

from deeplens_lightning.types import Batch, Origins, Provenance, key_of


class TrainedBatches:
    """Compare the number of batches that a loader served with the number that a Trainer has processed."""

    def __init__(self) -> None:
        self._ready_at_start = self._ready_seen = self._ready_saved = 0

    def unprocessed(self, trainer: Trainer | None, served: int) -> int:
        """Number of served batches that were not trained on: the Trainer fetched them ahead, or dropped them.

        Args:
            trainer: the Trainer; None without one.
            served: number of batches that the loader has served.
        """
        if trainer is None or not is_fitting(trainer):
            return 0
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress
        if served == 0:
            self._ready_at_start = progress.total.ready
        self._ready_seen = progress.total.ready
        begun: int = progress.current.ready - progress.current.processed
        done: int = progress.total.ready - self._ready_at_start - begun
        return served - done

    def rewound(self, trainer: Trainer | None, served: int) -> bool:
        """Whether the Trainer went back to an earlier step, as Lightning's tuners do after their trials.

        Args:
            trainer: the Trainer; None without one.
            served: number of batches that the loader has served.
        """
        if trainer is None or not served:
            return False
        return trainer.fit_loop.epoch_loop.batch_progress.total.ready < self._ready_seen

    def save(self, trainer: Trainer | None) -> None:
        """Note that a checkpoint is saved now."""
        if trainer is not None:
            self._ready_saved = trainer.fit_loop.epoch_loop.batch_progress.total.ready

    def saved_at(self, trainer: Trainer | None) -> bool:
        """Whether the Trainer stands where the last checkpoint was saved."""
        return (
            trainer is not None
            and trainer.fit_loop.epoch_loop.batch_progress.total.ready == self._ready_saved
        )


class SeenBatches:
    """Look up the provenance of batches that are still in memory; it is not pickled with the data module.

    Lightning casts a batch and moves it to a device after a loader has served it. A new tensor is another batch here,
    so the data module's hooks before and after the move carry the provenance over.
    """

    def __init__(self) -> None:
        self._origins: Any = WeakIdKeyDictionary()
        self._moving: Origins | None = None

    def __reduce__(self) -> tuple[type[SeenBatches], tuple[()]]:
        return SeenBatches, ()

    def remember(self, batch: Batch, origins: Origins) -> None:
        """Store the function that returns the provenance of a batch, until the batch is freed."""
        self._origins[key_of(batch)] = origins

    def before_move(self, batch: Batch, origins: Origins | None) -> None:
        """Note the provenance of a batch that is about to be moved.

        Args:
            batch: the batch, which may have been cast to a new tensor since it was served.
            origins: provenance to use if this tensor was not served itself; None if unknown.
        """
        self._moving = self._origins.get(key_of(batch), origins)

    def after_move(self, batch: Batch) -> None:
        """Store the provenance that `before_move` noted, for the batch as the module gets it."""
        if self._moving is not None:
            self.remember(batch, self._moving)
        self._moving = None

    def provenance(self, batch: Batch) -> Provenance | None:
        """The document, position and token id of each row of a batch; None if it was not stored for this batch."""
        return self.later(batch)()

    def later(self, batch: Batch) -> Callable[[], Provenance | None]:
        """A function that returns the provenance of a batch, also after the batch is freed."""
        origins: Origins | None = self._origins.get(key_of(batch))
        return lambda: Provenance(*origins().unbind(1)) if origins is not None else None


def is_fitting(trainer: Trainer | None) -> bool:
    """Whether a Trainer is inside `fit`."""
    return trainer is not None and trainer.state.fn == TrainerFn.FITTING


def trainer_ends_epochs(trainer: Trainer | None) -> bool:
    """Whether the Trainer is in `fit` and ends each epoch itself, after a fixed number of batches."""
    return trainer is not None and is_fitting(trainer) and trainer.fit_loop.max_batches != float("inf")
