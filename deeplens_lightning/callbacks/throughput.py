"""`Throughput`: log tokens per second, the share of time spent waiting for data, and peak memory."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from deeplens_lightning.activation_data import data_parallel_ranks
from deeplens_lightning.callbacks.support import batch_rows, log_every


class Throughput(Callback):
    """Logs how fast training runs each time that Lightning logs (`log_every_n_steps`).

    All times are since the last log and leave validation out. One row is one token.

    - `tokens_per_second`: tokens trained on per second, over all ranks; also on the progress bar.
    - `data_wait_fraction`: share of the time between the end of one step and the start of the next, in which the
      Trainer gets the next batch. On CUDA, steps are queued, so this shows only the waiting that the queue does not
      hide.
    - `memory/peak_rss_gb`: peak memory of the process of rank 0, in gigabytes (10⁹ bytes).
    - `memory/peak_cuda_gb`: peak memory on the GPU of rank 0, on CUDA alone.
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
        self._step_end = None  # the time around a validation is not spent waiting for the loader

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._step_end = None  # nor is the time in which a checkpoint is written

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
        rows = self._rows * data_parallel_ranks(trainer)
        module.log("tokens_per_second", rows / seconds, prog_bar=True, rank_zero_only=True)
        module.log("data_wait_fraction", min(1.0, self._waited / seconds), rank_zero_only=True)
        module.log("memory/peak_rss_gb", peak_rss() / 1e9, rank_zero_only=True)
        if module.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(module.device)
            module.log("memory/peak_cuda_gb", peak / 1e9, rank_zero_only=True)

    def _restart(self, now: float) -> None:
        self._window_start, self._waited, self._excluded, self._rows = now, 0.0, 0.0, 0


def peak_rss() -> int:
    """Peak resident memory of this process in bytes; 0 on Windows, which does not report it here."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
