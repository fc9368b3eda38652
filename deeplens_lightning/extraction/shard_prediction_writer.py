# ruff: noqa: ARG002
"""Write the rows of `trainer.predict` to shards, on any Lightning strategy and number of nodes.

In: the model batches of an `Extraction`. Out: a cache, in which each rank writes its own shards.
"""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from tqdm.auto import tqdm

from deeplens_lightning.preemption import Handler, stop_by_sigterm
from deeplens_lightning.shards.writer import SHARD_BYTES, NonFinite, ShardWriter
from deeplens_lightning.stream.document_order import Extraction, ModelRows


class ExtractionData(L.LightningDataModule):
    """Base class of data modules whose predict batches are rows in the order of the documents.

    Attributes:
        extraction: set in `setup("predict")` and returned by `predict_dataloader`.
    """

    extraction: Extraction | None = None


class ShardPredictionWriter(Callback):
    """Write the rows that `trainer.predict` yields to a cache of shards.

    The Trainer needs a data module of type `ExtractionData`, such as `ExtractionDataModule`, and the module
    `PassThrough`. Nothing is kept in memory beyond two shards. If the folder holds an incomplete cache of the same
    settings, writing continues after its last finished shard; if the cache is complete, no model runs. After SIGTERM each
    rank saves its rows at the end of the model batch and stops as after a `Preemption`, with the exit code 143.

    Attributes:
        writer: the open `ShardWriter`, after `setup`.
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
        """Choose the folder and the format.

        Args:
            folder: folder of the cache, a path or an fsspec URL.
            shard_bytes: size of a shard on disk, in bytes.
            storage: `exact`, or `int8` (8 bits per value and one scale per row; `shards.codec` documents its error).
            nonfinite: `refuse` or `drop` rows that hold NaN or infinity.
            show_progress: show a bar with rows, tokens/s, bytes written and, if the end is known, the time left.
        """
        super().__init__()
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
        self._terminated = False
        self._before: Handler = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Open the cache and set the row at which the extraction begins.

        Raises:
            TypeError: the Trainer's data module is not an `ExtractionData`.
            OtherConfigError: the folder holds a cache of other settings.
        """
        if stage != "predict":
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, ExtractionData) or data.extraction is None:
            raise TypeError(
                f"ShardPredictionWriter needs a data module that computes activations, got {type(data).__name__}: "
                "give trainer.predict(PassThrough(), datamodule=ExtractionDataModule(ActivationDataModule(...)))"
            )
        extraction = data.extraction
        self._extraction = extraction
        self.writer = ShardWriter(
            self.folder,
            extraction.manifest(self.storage),
            rank=extraction.rank,
            shard_bytes=self.shard_bytes,
            nonfinite=self.nonfinite,
            expected_rows=extraction.max_rows,
        )
        done = self.writer.complete or self.writer.finished
        extraction.resume = None if done else self.writer.resume

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the progress bar, and replace Lightning's handler of SIGTERM, which would have no effect."""
        writer, extraction = self._ready()
        if threading.current_thread() is threading.main_thread():

            def note(number: int, _frame: FrameType | None) -> None:
                launcher = trainer.strategy.launcher
                if launcher is not None and not self._terminated:
                    launcher.kill(number)  # the ranks that Lightning started
                self._terminated = True

            self._terminated, self._before = False, signal.signal(signal.SIGTERM, note)
        self._tokens, self._begun = 0, time.perf_counter()
        if writer.complete and trainer.is_global_zero:
            tqdm.write(f"{self.folder} is complete: nothing to write")
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
        """Write the rows of one model batch.

        Raises:
            TypeError: the module returned something else than its batch.
            SIGTERMException: the process has received SIGTERM; all rows so far are saved.
        """
        writer, _ = self._ready()
        rows = outputs
        if not isinstance(rows, ModelRows):
            raise TypeError(
                f"predict_step must return its batch of rows, got {type(rows).__name__}: predict with PassThrough()"
            )
        new = rows.first_row + len(rows.provenance) - max(rows.first_row, writer.resume.row)
        writer.append(rows.rows, rows.provenance, source=rows.source, first_row=rows.first_row)
        self._tokens += rows.tokens
        if self._bar is not None:
            self._bar.update(max(0, new))
            rate = self._tokens / max(time.perf_counter() - self._begun, 1e-9)
            self._bar.set_postfix_str(
                f"{rate:,.0f} tokens/s, {writer.nbytes / 2**20:,.0f} MiB", refresh=False
            )
        if self._terminated:
            writer.sync()
            stop_by_sigterm(trainer)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Finish the cache; save the rows of an incomplete one if a limit of the Trainer ended the prediction."""
        writer, extraction = self._ready()
        if extraction.exhausted:
            writer.finish()
        else:
            writer.sync()
        self._close()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Release the folder; finished shards remain."""
        self._close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Release the folder."""
        self._close()

    def _ready(self) -> tuple[ShardWriter, Extraction]:
        if self.writer is None or self._extraction is None:
            raise RuntimeError(
                "ShardPredictionWriter has no open folder: use it as a callback of trainer.predict"
            )
        return self.writer, self._extraction

    def _close(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None
        if self.writer is not None:
            self.writer.close()
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class PassThrough(L.LightningModule):
    """A module whose prediction is its batch: the data module's frozen model has computed the rows."""

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """Return the batch."""
        return batch
