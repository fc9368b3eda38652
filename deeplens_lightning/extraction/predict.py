"""Write a cache of activations with `trainer.predict`, on any Lightning strategy: `deeplens-lightning extract`.

In: a data module that computes activations, and a folder. Out: shards in that folder, or an estimate of their rows,
bytes and time.
"""

from __future__ import annotations

import lightning as L

from deeplens_lightning.datamodule import ActivationDataModule
from deeplens_lightning.extraction.shard_prediction_writer import (
    ExtractionData,
    PassThrough,
    ShardPredictionWriter,
)
from deeplens_lightning.shards.writer import SHARD_BYTES, NonFinite
from deeplens_lightning.stream.document_order import Extraction, Plan


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

    Raises:
        OtherConfigError: the folder holds a cache of other settings.
        NonFiniteError: rows hold NaN or infinity, with `nonfinite="refuse"`.
        DiskFullError: the shards do not fit on the disk.
    """
    module = ExtractionDataModule(data, max_rows)
    writer = ShardPredictionWriter(out, shard_bytes=shard_bytes, storage=storage, nonfinite=nonfinite)
    L.Trainer(
        callbacks=[writer],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy,
    ).predict(PassThrough(), datamodule=module, return_predictions=False)
