# ruff: noqa: ARG002
"""`ShardPredictionWriter`: `trainer.predict` writes a cache, on any strategy and number of nodes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from tqdm.auto import tqdm

from deeplens_lightning.shards.writer import SHARD_BYTES, NonFinite, ShardWriter
from deeplens_lightning.stream.document_order import Extraction, ModelRows


class ShardPredictionWriter(Callback):
    """Writes what is predicted to shards, each rank its own, and keeps nothing in memory.

    The DataModule must have an `extraction` after `setup("predict")` and give it out as its
    `predict_dataloader`; the module that predicts hands batches through (`PassThrough`). Where an earlier run
    was killed, this one goes on behind its last finished shard; where it finished, nothing is done.

    Args:
        folder: of the cache, a path or an fsspec URL.
        shard_bytes: size of a shard on disk.
        storage: `exact`, or `int8` (8 bits and one scale per row; see `shards.codec` for its error).
        nonfinite: `refuse` or `drop` rows that hold NaN or infinity.
        show_progress: a bar with rows, tokens/s, bytes written and, where the end is known, time left.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        shard_bytes: int = SHARD_BYTES,
        storage: str = "exact",
        nonfinite: NonFinite = "refuse",
        show_progress: bool = True,
    ) -> None:
        self.folder = str(folder)
        self.shard_bytes = shard_bytes
        self.storage = storage
        self.nonfinite = nonfinite
        self.show_progress = show_progress
        self.writer: ShardWriter | None = None
        self._extraction: Extraction | None = None
        self._bar: tqdm[Any] | None = None
        self._tokens = 0
        self._begun = 0.0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Open the cache and tell the extraction where to begin."""
        if stage != "predict":
            return
        extraction = getattr(getattr(trainer, "datamodule", None), "extraction", None)
        if not isinstance(extraction, Extraction):
            raise TypeError(
                "writing shards needs a data module that computes activations: "
                "trainer.predict(PassThrough(), datamodule=ActivationDataModule(hf_model=...))"
            )
        self._extraction = extraction
        self.writer = ShardWriter(
            self.folder,
            extraction.manifest(self.storage),
            rank=extraction.documents.rank,
            shard_bytes=self.shard_bytes,
            nonfinite=self.nonfinite,
            expected_rows=extraction.max_rows,
        )
        done = self.writer.complete or self.writer.finished
        extraction.resume = None if done else self.writer.resume

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the progress bar."""
        writer, extraction = self._ready()
        self._tokens, self._begun = 0, time.perf_counter()
        if writer.complete and trainer.is_global_zero:
            tqdm.write(f"{self.folder} is complete: nothing to do")
        self._bar = tqdm(
            total=extraction.max_rows,
            initial=writer.resume.row,
            desc=f"writing {self.folder}",
            unit="row",
            unit_scale=True,
            disable=not (self.show_progress and trainer.is_global_zero) or extraction.resume is None,
        )

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the rows of a model batch."""
        writer, _ = self._ready()
        rows = ModelRows(*outputs)
        new = rows.first_row + len(rows.provenance) - max(rows.first_row, writer.resume.row)
        writer.append(rows.rows, rows.provenance, source=rows.source, first_row=rows.first_row)
        self._tokens += rows.tokens
        if self._bar is not None:
            self._bar.update(max(0, new))
            rate = self._tokens / max(time.perf_counter() - self._begun, 1e-9)
            self._bar.set_postfix_str(
                f"{rate:,.0f} tokens/s, {writer.nbytes / 2**20:,.0f} MiB", refresh=False
            )

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the cache, or leave it to be continued if the Trainer's limits came first."""
        writer, extraction = self._ready()
        if extraction.exhausted:
            writer.finish()
        else:
            writer.sync()
        self._close()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Keep the finished shards and let others write."""
        self._close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let go of the folder."""
        self._close()

    def _ready(self) -> tuple[ShardWriter, Extraction]:
        if self.writer is None or self._extraction is None:
            raise RuntimeError("ShardPredictionWriter was not set up: it works in trainer.predict")
        return self.writer, self._extraction

    def _close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class PassThrough(L.LightningModule):
    """Predicts what it is given: the rows were computed by the DataModule's frozen model."""

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """The batch itself."""
        return batch
