"""`Throughput`: tokens per second, how much of the time the step waits for data, and memory."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from deeplens_lightning.callbacks.support import batch_rows, log_every


class Throughput(Callback):
    """Logs how fast training runs, each time Lightning logs (`log_every_n_steps`).

    One row is one token. Over the steps since the last log, validation aside: `tokens_per_second` of all
    ranks together (on the progress bar too), `data_wait_fraction`, the share of time between the end of
    one step and the start of the next (where the loader is asked for a batch), and peak memory:
    `memory/peak_rss_gb`, on CUDA also `memory/peak_cuda_gb` (decimal gigabytes, of rank 0).
    On CUDA, steps are queued: a wait is then what remains after the queue is full.
    """

    def __init__(self) -> None:
        self._window_start = 0.0
        self._step_end: float | None = None
        self._waited = 0.0
        self._excluded = 0.0
        self._rows = 0
        self._validation_start = 0.0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart(time.perf_counter())
        self._step_end = None

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._step_end is not None:
            self._waited += time.perf_counter() - self._step_end

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_start = time.perf_counter()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._excluded += time.perf_counter() - self._validation_start
        self._step_end = None  # the gap around a validation says nothing about the loader

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._step_end = None  # nor does the gap in which a checkpoint is written

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._rows += batch_rows(batch)
        now = time.perf_counter()
        step, every = trainer.global_step, log_every(trainer)
        if every > 0 and step > 0 and step % every == 0 and now > self._window_start:
            self._log(trainer, pl_module, now)
            self._restart(now)
        self._step_end = now

    def _log(self, trainer: Trainer, module: LightningModule, now: float) -> None:
        seconds = max(now - self._window_start - self._excluded, 1e-9)
        rows = self._rows * trainer.world_size
        module.log("tokens_per_second", rows / seconds, prog_bar=True, rank_zero_only=True)
        module.log("data_wait_fraction", min(1.0, self._waited / seconds), rank_zero_only=True)
        module.log("memory/peak_rss_gb", peak_rss() / 1e9, rank_zero_only=True)
        if module.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(module.device)
            module.log("memory/peak_cuda_gb", peak / 1e9, rank_zero_only=True)

    def _restart(self, now: float) -> None:
        self._window_start, self._waited, self._excluded, self._rows = now, 0.0, 0.0, 0


def peak_rss() -> int:
    """The most memory, in bytes, that this process has held; 0 where the platform does not say."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
