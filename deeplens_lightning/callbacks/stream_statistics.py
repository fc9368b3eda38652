"""`StreamStatistics`: log what the data stream read, served, mixed and dropped during training."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from deeplens_lightning.activation_data import activation_data, data_parallel_ranks
from deeplens_lightning.callbacks.support import batch_rows, log_every
from deeplens_lightning.disk.records import Count, read_record
from deeplens_lightning.stream.loader import ActivationLoader


@dataclass(frozen=True, kw_only=True)
class _State:
    rows: Count


class StreamStatistics(Callback):
    """Logs figures of the stream of rank 0 each time that Lightning logs (`log_every_n_steps`).

    - `stream/rows`: rows trained on up to now, over all ranks; continues after a checkpoint.
    - `stream/documents`, `stream/tokens`: documents and tokens read in this epoch since the stream was opened. Tokens
      that give no row (special tokens, for example) count too.
    - `stream/documents_per_batch`: effective number of distinct documents in this batch, 1 / Σ p², with p the share of
      rows of each document (the inverse Simpson index).
    - `stream/row_age`: mean number of rows served between the time when a row of this batch was computed and now; about
      the size of the buffer once it is full.
    - `stream/wait_fraction`: share of the time since the last log in which training waited for a batch.
    - `stream/rows_dropped`: rows dropped, over all ranks, at ends of epochs where some ranks ran out of rows before
      others.

    A figure that the data source does not have is left out: shards, for example, run no text through a model.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._begun = 0.0
        self._waited = 0.0

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = read_record(_State, state_dict, "the checkpoint's state of StreamStatistics").rows

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begun = time.perf_counter()
        loader = trainer.train_dataloader
        self._waited = loader.wait_seconds if isinstance(loader, ActivationLoader) else 0.0

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.rows += batch_rows(batch) * data_parallel_ranks(trainer)
        step, every = trainer.global_step, log_every(trainer)
        loader = trainer.train_dataloader
        if every <= 0 or step % every or not isinstance(loader, ActivationLoader):
            return
        found: dict[str, float] = {"rows": self.rows, "rows_dropped": loader.rows_dropped}
        now = time.perf_counter()
        found["wait_fraction"] = min(1.0, (loader.wait_seconds - self._waited) / max(now - self._begun, 1e-9))
        self._begun, self._waited = now, loader.wait_seconds
        counts = loader.stream.counts
        found |= {name: counts[name] for name in ("documents", "tokens") if name in counts}
        if (age := loader.row_age()) is not None:
            found["row_age"] = age
        provenance = activation_data(trainer).provenance(batch)
        if provenance is not None and bool((provenance.document_index >= 0).all()):
            found["documents_per_batch"] = effective_number(provenance.document_index)
        for name, value in found.items():
            pl_module.log(f"stream/{name}", float(value), rank_zero_only=True)


def effective_number(labels: Tensor) -> float:
    """Inverse Simpson index 1 / Σ p², with p the share of each label: n if all n differ, 1 if all are equal.

    Args:
        labels: int64 `(n,)`.
    """
    counts = torch.unique(labels, return_counts=True)[1]
    return len(labels) ** 2 / int((counts**2).sum())
