"""Send a signal to this process at a known batch, for tests of what a run does when it is stopped."""

from __future__ import annotations

import os
from typing import Any

import lightning as L


class SendSignal(L.Callback):
    """Send a signal to this process before a batch is trained on or predicted.

    Args:
        number: the signal's number.
        batch: number of the batch, from 0.
        rank: the rank that sends it to itself.
    """

    def __init__(self, number: int, batch: int, rank: int = 0) -> None:
        self.number, self.batch, self.rank = number, batch, rank

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self._send(trainer, batch_idx)

    def on_predict_batch_start(
        self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._send(trainer, batch_idx)

    def _send(self, trainer: L.Trainer, batch_idx: int) -> None:
        if batch_idx == self.batch and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.number)
