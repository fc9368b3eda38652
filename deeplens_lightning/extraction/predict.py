"""Write a cache of activations with `trainer.predict`, on any Lightning strategy: `deeplens-lightning extract`.

In: a data module that computes activations, and a folder. Out: shards in that folder, or an estimate of their rows,
bytes and time.
"""

from __future__ import annotations

import sys

import lightning as L
from lightning.pytorch.callbacks import Callback

from deeplens_lightning.callbacks.support import from_rank_zero
from deeplens_lightning.datamodule import ActivationDataModule
from deeplens_lightning.extraction.saved_features import gigabytes
from deeplens_lightning.extraction.shard_prediction_writer import (
    ExtractionData,
    PassThrough,
    ShardPredictionWriter,
)
from deeplens_lightning.shards.writer import SHARD_BYTES, NonFinite
from deeplens_lightning.stream.document_order import Extraction, Plan

LARGE = 5 * 10**9
"""Bytes of a cache above which a person at a terminal must have agreed to its size."""


class ExtractionDataModule(ExtractionData):
    """Serve the rows of an `ActivationDataModule` to `trainer.predict`, unshuffled, document after document."""

    def __init__(self, data: ActivationDataModule, max_rows: int | None = None) -> None:
        """Take the model, the hook points and the text from another data module.

        Args:
            data: a data module that computes activations from a model.
            max_rows: number of rows to extract, over all ranks; default all.

        Raises:
            ValueError: `data` reads shards.
        """
        super().__init__()
        self.data, self.max_rows = data, max_rows
        if data.settings.shards is not None:
            raise ValueError(
                "extract computes activations from a model: remove shards= and name the model with hf_model="
            )

    def prepare_data(self) -> None:
        """Check the settings and download the model, once per node."""
        self.data.prepare_data()

    def setup(self, stage: str) -> None:  # noqa: ARG002
        """Load this rank's text and model."""
        self.data.trainer = self.trainer
        self.data.setup()
        assert self.data.live is not None  # open, and not from shards
        extraction = self.data.live.extraction(None)
        if self.max_rows is not None:
            extraction.max_rows = -(-self.max_rows // extraction.ranks)
        self.extraction = extraction

    def predict_dataloader(self) -> Extraction:
        """This rank's rows, one model batch per item.

        Raises:
            RuntimeError: `setup` was not called.
        """
        if self.extraction is None:
            raise RuntimeError(
                "the model is not loaded: call trainer.predict(PassThrough(), datamodule=...), or setup('predict') first"
            )
        return self.extraction

    def teardown(self, stage: str) -> None:
        """Free the model."""
        self.data.teardown(stage)
        self.data.trainer = None


class AnnouncedSize(Callback):
    """Print the estimated size of a cache before it is written; on a terminal, refuse an unexpectedly large one.

    Args:
        out: folder of the cache.
        storage: `exact` or `int8`.
        agreed: whether the user has agreed to any size.
    """

    def __init__(self, out: str, storage: str, agreed: bool) -> None:
        self.out, self.storage, self.agreed = out, storage, agreed

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Print the size on rank 0. A collective: every rank calls it.

        Raises:
            ValueError: it is above `LARGE` or not known, there is a terminal, and the user has not agreed.
        """
        extraction = trainer.datamodule.predict_dataloader()  # type: ignore[attr-defined]
        from_rank_zero(trainer, lambda: self._announce(extraction))

    def _announce(self, extraction: Extraction) -> None:
        rows, row_bytes = extraction.expected_rows(), extraction.manifest(self.storage).row_bytes
        size = f"all rows of a dataset of unknown length, {row_bytes:,} bytes each"
        if rows is not None:
            size = f"about {rows:,} rows of {row_bytes:,} bytes, {gigabytes(rows * row_bytes)}"
        large = rows is None or rows * row_bytes > LARGE
        if large and not self.agreed and sys.stdin is not None and sys.stdin.isatty():
            raise ValueError(
                f"{self.out} would hold {size}: add --yes to write them, or --max_rows {LARGE // row_bytes} for "
                f"{gigabytes(LARGE)}"
            )
        print(f"{self.out}: {size}")


def estimate(
    data: ActivationDataModule,
    *,
    max_rows: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    storage: str = "exact",
) -> Plan:
    """Estimate rows, bytes, time and memory of an extraction from a few hundred documents; nothing is written.

    Args:
        data: a data module that computes activations from a model.
        max_rows: number of rows to extract, over all ranks; default all.
        shard_bytes: size of a shard on disk, in bytes.
        storage: `exact` or `int8`.
    """
    module = ExtractionDataModule(data, max_rows)
    module.setup("predict")
    plan = module.predict_dataloader().plan(storage, shard_bytes)
    module.teardown("predict")
    return plan


def run(
    data: ActivationDataModule,
    out: str,
    *,
    max_rows: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    storage: str = "exact",
    nonfinite: NonFinite = "refuse",
    accelerator: str = "auto",
    devices: int | str = 1,
    num_nodes: int = 1,
    strategy: str = "auto",
    yes: bool = False,
) -> None:
    """Write a cache, or continue one that an earlier call left incomplete.

    Args:
        data: a data module that computes activations from a model.
        out: folder of the cache, a path or an fsspec URL.
        max_rows: number of rows to extract, over all ranks; default all.
        shard_bytes: size of a shard on disk, in bytes.
        storage: `exact`, or `int8` (8 bits per value and one scale per row).
        nonfinite: `refuse` or `drop` rows that hold NaN or infinity.
        accelerator: accelerator of the Trainer.
        devices: devices of the Trainer.
        num_nodes: number of nodes of the Trainer.
        strategy: strategy of the Trainer; every rank writes its own shards.
        yes: write a cache of any size, also if there is a terminal.

    Raises:
        ValueError: there is a terminal, the cache would be larger than `LARGE`, and `yes` is not given.
        OtherConfigError: the folder holds a cache of other settings.
        NonFiniteError: rows hold NaN or infinity, with `nonfinite="refuse"`.
        DiskFullError: the shards do not fit on the disk.
    """
    module = ExtractionDataModule(data, max_rows)
    writer = ShardPredictionWriter(out, shard_bytes=shard_bytes, storage=storage, nonfinite=nonfinite)
    L.Trainer(
        callbacks=[AnnouncedSize(out, storage, yes), writer],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy,
    ).predict(PassThrough(), datamodule=module, return_predictions=False)
