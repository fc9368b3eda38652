"""A signal from a cluster becomes a checkpoint at the end of the batch, on every rank.

Lightning saves inside the signal handler, in the middle of whatever the batch was doing, and on SIGTERM not at
all. Here handlers only set a flag; the ranks look at it together when a batch is over.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

Handler = Callable[[int, FrameType | None], Any] | int | None


class Preemption(Checkpoint):
    """Saves at the next batch end after SIGTERM, and after the signal that SLURM sends before it ends a job.

    - SIGTERM: `preempted.ckpt` is written and training stops, as Lightning stops on SIGTERM. Where SLURM
      requeues, Lightning ignores SIGTERM; so the file is written and training goes on until the job ends.
    - The requeue signal of Lightning's `SLURMEnvironment` (SIGUSR1, unless changed): Lightning's own plugin saves
      its checkpoint and requeues the job, at the end of the batch instead of in the middle of it.

    On one rank a batch costs nothing; on several, one reduction of a flag.

    Args:
        dirpath: where `preempted.ckpt` goes; default the Trainer's `default_root_dir`.
    """

    FILE = "preempted.ckpt"

    def __init__(self, dirpath: str | Path | None = None) -> None:
        super().__init__()
        self._dirpath = dirpath
        self._received: set[int] = set()
        self._before: dict[int, Handler] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Take the signals over from Lightning, which has set its handlers by now."""
        signals = [signal.SIGTERM]
        if requeue := _requeue_signal(trainer):
            signals.append(requeue)
        for number in signals:
            self._before[number] = signal.signal(number, self._note)

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Save if any rank was told to."""
        for number in sorted(self._before):
            if not _any_rank(trainer, number in self._received):
                continue
            self._received.discard(number)
            if number == signal.SIGTERM:
                self._save(trainer)
                if _requeue_signal(trainer) is None:
                    raise SIGTERMException
            elif callable(handler := self._before[number]):
                handler(number, None)  # Lightning's: saves and requeues

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Give the signals back."""
        self._give_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """Give the signals back."""
        self._give_back()

    def _save(self, trainer: Trainer) -> None:
        path = Path(self._dirpath or trainer.default_root_dir) / self.FILE
        trainer.save_checkpoint(path)
        rank_zero_info(f"preempted: {path} holds step {trainer.global_step}")

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._received.add(number)

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before, self._received = {}, set()


def _requeue_signal(trainer: Trainer) -> signal.Signals | None:
    """The signal on which Lightning requeues a SLURM job, if it does."""
    environment = trainer._accelerator_connector.cluster_environment  # a strategy on one device has none
    if not getattr(environment, "auto_requeue", False):
        return None
    return getattr(environment, "requeue_signal", None) or signal.SIGUSR1


def _any_rank(trainer: Trainer, mine: bool) -> bool:
    if trainer.world_size == 1:
        return mine
    flag = torch.tensor(int(mine), device=trainer.strategy.root_device)
    return bool(trainer.strategy.reduce(flag, reduce_op="sum") > 0)
