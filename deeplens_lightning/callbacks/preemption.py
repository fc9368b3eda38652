"""`Preemption`: save a checkpoint at the end of a batch when a cluster signals that it will end the job.

Lightning's handler for SLURM's signal saves at once, in the middle of a batch, and its handler for SIGTERM does not
save. Here the handlers only set a flag, and all ranks check their flags together at the end of each batch.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

Handler = Callable[[int, FrameType | None], Any] | int | None


class Preemption(Checkpoint):
    """Saves a checkpoint at the end of the batch after SIGTERM or after SLURM's requeue signal.

    - SIGTERM: writes `preempted.ckpt`, then stops training by raising `SIGTERMException`, as Lightning does. Where
      Lightning requeues SLURM jobs it ignores SIGTERM; there the file is written and training continues until the job
      ends.
    - The requeue signal of Lightning's `SLURMEnvironment` (SIGUSR1 unless changed): runs Lightning's own handler, which
      saves its checkpoint and requeues the job, at the end of the batch instead of in the middle of it.

    With one rank this costs no time; with several, one reduction of a flag for each batch and signal.

    Args:
        dirpath: folder of `preempted.ckpt`; default the Trainer's `default_root_dir`.
    """

    FILE = "preempted.ckpt"

    def __init__(self, dirpath: str | Path | None = None) -> None:
        super().__init__()
        self._dirpath = dirpath
        self._received: set[int] = set()
        self._before: dict[int, Handler] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Replace Lightning's signal handlers, which are set by now, and keep them for later."""
        signals = [signal.SIGTERM]
        if requeue := _requeue_signal(trainer):
            signals.append(requeue)
        for number in signals:
            self._before[number] = signal.signal(number, self._note)

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Save if any rank received a signal during the batch."""
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
        """Restore the earlier signal handlers."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """Restore the earlier signal handlers."""
        self._restore()

    def _save(self, trainer: Trainer) -> None:
        path = Path(self._dirpath or trainer.default_root_dir) / self.FILE
        trainer.save_checkpoint(path)
        rank_zero_info(f"preempted: saved step {trainer.global_step} to {path}; resume with ckpt_path={path}")

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._received.add(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before, self._received = {}, set()


def _requeue_signal(trainer: Trainer) -> signal.Signals | None:
    """The signal on which Lightning requeues a SLURM job; None where it does not requeue."""
    # Lightning has no public way to the environment; `strategy.cluster_environment` is missing on one device.
    environment = trainer._accelerator_connector.cluster_environment
    if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
        return None
    return environment.requeue_signal


def _any_rank(trainer: Trainer, mine: bool) -> bool:
    """Whether the flag is set on any rank. A collective on several ranks."""
    if trainer.world_size == 1:
        return mine
    flag = torch.tensor(int(mine), device=trainer.strategy.root_device)
    return bool(trainer.strategy.reduce(flag, reduce_op="sum") > 0)
