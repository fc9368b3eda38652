"""Count what a Trainer has trained on, from its own progress, and recognise the batches that it was given.

In: Lightning's loops. Out: the number of served batches that no step has used, and the provenance of a batch.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from deeplens_lightning.stream.loader import key_of
from deeplens_lightning.types import Batch, Provenance


class TrainedBatches:
    """Compares the batches that a loader served with those that a Trainer says it has processed."""

    def __init__(self) -> None:
        self._ready_at_start = self._ready_seen = 0

    def unprocessed(self, trainer: Trainer | None, served: int) -> int:
        """Batches that were served and not trained on: read ahead, or thrown away by the Trainer.

        Args:
            trainer: the one that fits, if any.
            served: batches that the loader has served.
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
        """Whether the Trainer went back to an earlier step, as tuners do after their trials."""
        if trainer is None or not served:
            return False
        return trainer.fit_loop.epoch_loop.batch_progress.total.ready < self._ready_seen


class SeenBatches:
    """The provenance of batches that are still alive; it stays in this process when the data module is pickled."""

    def __init__(self) -> None:
        self._tables: Any = WeakIdKeyDictionary()

    def __reduce__(self) -> tuple[type[SeenBatches], tuple[()]]:
        return SeenBatches, ()

    def remember(self, batch: Batch, provenance: Tensor) -> None:
        """Keep the provenance of a batch, int64 `(batch, 4)`, for as long as the batch lives."""
        self._tables[key_of(batch)] = provenance

    def provenance(self, batch: Batch) -> Provenance | None:
        """Where the rows of a batch came from; None for a batch that is not known."""
        table = self._tables.get(key_of(batch))
        return Provenance(*table.unbind(1)) if table is not None else None


def is_fitting(trainer: Trainer | None) -> bool:
    """Whether a Trainer is inside `fit`."""
    return trainer is not None and trainer.state.fn == TrainerFn.FITTING


def trainer_ends_epochs(trainer: Trainer | None) -> bool:
    """Whether the Trainer has a number of batches for an epoch, and so ends it itself."""
    return trainer is not None and is_fitting(trainer) and trainer.fit_loop.max_batches != float("inf")
