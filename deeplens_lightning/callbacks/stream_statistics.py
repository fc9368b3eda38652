"""`StreamStatistics`: what the data are doing while training runs."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from deeplens_lightning.callbacks.support import batch_rows, log_every
from deeplens_lightning.stream.loader import ActivationLoader


class StreamStatistics(Callback):
    """Logs what the stream does, each time Lightning logs (`log_every_n_steps`), for rank 0.

    - `stream/rows`: rows trained on so far, over all ranks; it goes on after a checkpoint.
    - `stream/documents`, `stream/tokens`: read in this epoch since the stream was entered. A token that is in no row
      (a special token, say) counts.
    - `stream/documents_per_batch`: effective number of distinct documents in this batch, 1 / Σ p², p the share of
      rows that a document has (the inverse Simpson index).
    - `stream/row_age`: how many rows were served, on average, between the moment that a row of this batch was
      computed and now; about a buffer's worth once the buffer is full.
    - `stream/wait_fraction`: share of the time since the last log that training waited for a batch.
    - `stream/rows_dropped`: at ends of epochs that some ranks reached before others, over all ranks.

    What a data source cannot say is left out (shards run no text through a model).
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
        self.rows = state_dict["rows"]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begun = time.perf_counter()
        loader = trainer.train_dataloader
        self._waited = loader.wait_seconds if isinstance(loader, ActivationLoader) else 0.0

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.rows += batch_rows(batch) * trainer.world_size
        step, every = trainer.global_step, log_every(trainer)
        loader = trainer.train_dataloader
        if every <= 0 or step % every or not isinstance(loader, ActivationLoader):
            return
        found: dict[str, float] = {"rows": self.rows, "rows_dropped": loader.rows_dropped}
        now = time.perf_counter()
        found["wait_fraction"] = min(1.0, (loader.wait_seconds - self._waited) / max(now - self._begun, 1e-9))
        self._begun, self._waited = now, loader.wait_seconds
        counts = getattr(loader.stream, "counts", {})
        found |= {name: counts[name] for name in ("documents", "tokens") if name in counts}
        if (age := loader.row_age()) is not None:
            found["row_age"] = age
        provenance = getattr(trainer, "datamodule", None) and trainer.datamodule.provenance(batch)  # type: ignore[attr-defined]
        if provenance is not None and bool((provenance.document_index >= 0).all()):
            found["documents_per_batch"] = effective_number(provenance.document_index)
        for name, value in found.items():
            pl_module.log(f"stream/{name}", float(value), rank_zero_only=True)


def effective_number(labels: Tensor) -> float:
    """1 / Σ p² over the shares p of each label in an int64 `(n,)`: n if all differ, 1 if all are the same."""
    shares = torch.unique(labels, return_counts=True)[1].double() / len(labels)
    return float(1 / (shares**2).sum())
