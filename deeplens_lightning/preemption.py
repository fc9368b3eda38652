"""`Preemption`: save a checkpoint at the end of a batch when a cluster signals that it will end the job.

Lightning's handler for SLURM's signal saves at once, in the middle of a batch. Its handler for SIGTERM does not save, and
of several ranks only rank 0 can stop the others. Here the handlers only set a flag, and the ranks exchange their flags,
so that all of them act at the end of the same batch.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from deeplens_lightning.distributed import world_size

Handler = Callable[[int, FrameType | None], Any] | int | None


class Preemption(Checkpoint):
    """Saves a checkpoint at the end of a batch after SIGTERM or after SLURM's requeue signal to any rank.

    - SIGTERM: writes `preempted.ckpt`, then stops training by raising `SIGTERMException`, as Lightning does. A process
      that does not catch it exits with 143 (128 + 15), not with Lightning's 0. Where Lightning requeues SLURM jobs it
      ignores SIGTERM; there the file is written and training continues until the job ends.
    - The requeue signal of Lightning's `SLURMEnvironment` (SIGUSR1 unless changed): runs Lightning's own handler, which
      saves its checkpoint and requeues the job, at the end of the batch instead of in the middle of it.

    One rank acts at the end of the batch in which the signal came. Several ranks act together, one batch later: the flags
    of all signals are reduced on the host while the next batch runs, and no rank waits for its accelerator.

    Args:
        dirpath: folder of `preempted.ckpt`; default the Trainer's `default_root_dir`.
    """

    FILE = "preempted.ckpt"

    def __init__(self, dirpath: str | Path | None = None) -> None:
        super().__init__()
        self._dirpath = dirpath
        self._signals: list[int] = []
        self._received: set[int] = set()
        self._before: dict[int, Handler] = {}
        self._flags: _FlagsOfRanks | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Replace Lightning's signal handlers, which are set by now, and keep them for later. A collective."""
        requeue = _requeue_signal(trainer)
        self._signals = [signal.SIGTERM] if requeue is None else sorted([signal.SIGTERM, requeue])
        self._flags = _FlagsOfRanks() if world_size() > 1 else None
        if threading.current_thread() is not threading.main_thread():
            rank_zero_warn(
                "Preemption does not see signals, because fit runs in a thread, and Python handles signals in the main "
                "thread only: call fit in the main thread, or save checkpoints often with ModelCheckpoint"
            )
            return
        for number in self._signals:
            self._before[number] = signal.signal(number, self._note)

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Save if a rank has received a signal. A collective."""
        if self._flags is None:
            self._act(trainer, self._received & set(self._signals))
            return
        self._act(trainer, self._from_any_rank())
        self._flags.start([number in self._received for number in self._signals])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Save if a rank received a signal in the last batch, and restore the earlier handlers. A collective."""
        try:
            if self._flags is not None:
                self._act(trainer, self._from_any_rank())
                self._flags.close()
        finally:
            self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """Restore the earlier signal handlers. Nothing here waits for other ranks, which may have failed."""
        self._restore()

    def _from_any_rank(self) -> set[int]:
        """The signals that some rank had received when the last reduction was started."""
        assert self._flags is not None
        return {number for number, flag in zip(self._signals, self._flags.result(), strict=False) if flag}

    def _act(self, trainer: Trainer, received: set[int]) -> None:
        for number in sorted(received):
            self._received.discard(number)
            if number == signal.SIGTERM:
                self._save(trainer)
                if _requeue_signal(trainer) is None:
                    stop_by_sigterm(trainer)
            elif callable(handler := self._before.get(number)):
                handler(number, None)  # Lightning's: saves and requeues

    def path(self, trainer: Trainer) -> Path:
        """Where it saves."""
        return Path(self._dirpath or trainer.default_root_dir) / self.FILE

    @property
    def signalled(self) -> bool:
        """Whether this rank has received a signal on which `Preemption` has not acted yet."""
        return bool(self._received)

    def _save(self, trainer: Trainer) -> None:
        path = self.path(trainer)
        trainer.save_checkpoint(path)
        rank_zero_info(f"preempted: saved step {trainer.global_step} to {path}; resume with ckpt_path={path}")

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._received.add(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before, self._received, self._flags = {}, set(), None


class _FlagsOfRanks:
    """Reduce flags over all ranks on the host: start at one batch's end, read at the next. A collective.

    The group is gloo's own: NCCL's would queue the reduction behind the work of the accelerator.
    """

    def __init__(self) -> None:
        try:
            self._group = dist.new_group(backend="gloo")
        except RuntimeError as error:
            raise RuntimeError(
                "Preemption exchanges signals between the ranks with gloo, which cannot connect them: set "
                "GLOO_SOCKET_IFNAME to the network interface between the nodes. To train without Preemption, override "
                "configure_callbacks of the module to return []"
            ) from error
        self._running: tuple[dist.Work, Tensor] | None = None

    def start(self, flags: Sequence[bool]) -> None:
        """Start the reduction of this rank's flags."""
        reduced = torch.tensor(flags, dtype=torch.uint8, device="cpu")
        work = dist.all_reduce(reduced, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._running = work, reduced

    def result(self) -> list[bool]:
        """Flags set on any rank when the last reduction was started; empty if none was started."""
        if self._running is None:
            return []
        work, reduced = self._running
        self._running = None
        work.wait()
        return [bool(flag) for flag in reduced.tolist()]

    def close(self) -> None:
        """Free the group; every reduction was read."""
        dist.destroy_process_group(self._group)


def stop_by_sigterm(trainer: Trainer) -> NoReturn:
    """End this process's part of a run as Lightning does after SIGTERM, with the exit code 143 instead of 0.

    Raises:
        SIGTERMException: always.
    """
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher):
        launcher.procs.clear()  # Lightning would kill this process as soon as another rank has exited with a code above 0
    raise SIGTERMException(128 + signal.SIGTERM)


def default_preemption(trainer: Trainer) -> list[Callback]:
    """A `Preemption` for a Trainer with several ranks that saves checkpoints and has none of its own; else empty.

    Without it Lightning looks at SIGTERM on rank 0 alone, and a rank that a cluster ends loses what it has trained.
    """
    several = trainer.num_nodes * trainer.num_devices > 1
    present = any(isinstance(callback, Preemption) for callback in trainer.checkpoint_callbacks)
    return [Preemption()] if several and trainer.checkpoint_callbacks and not present else []


def _requeue_signal(trainer: Trainer) -> signal.Signals | None:
    """The signal on which Lightning requeues a SLURM job; None where it does not requeue."""
    # Lightning has no public way to the environment; `strategy.cluster_environment` is missing on one device.
    environment = trainer._accelerator_connector.cluster_environment
    if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
        return None
    return environment.requeue_signal
