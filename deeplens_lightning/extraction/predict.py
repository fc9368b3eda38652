"""`deeplens-lightning extract`: `trainer.predict` with a writer, so that any strategy writes the same cache.

In: a streaming data module and where to write. Out: a folder of shards, or what writing it would take.
"""

from __future__ import annotations

from typing import Any

import lightning as L

from deeplens_lightning.datamodule import ActivationDataModule
from deeplens_lightning.extraction.shard_prediction_writer import PassThrough, ShardPredictionWriter
from deeplens_lightning.stream.document_order import Extraction, Plan
from deeplens_lightning.stream.live_source import LiveActivations


class ExtractionDataModule(L.LightningDataModule):
    """Hands a data module's rows to `predict`, in the order of the documents.

    Args:
        data: names the model, the hook points and the text.
        max_rows: rows to extract, over all ranks; default all.
    """

    def __init__(self, data: ActivationDataModule, max_rows: int | None = None) -> None:
        super().__init__()
        if not isinstance(data.source, LiveActivations):
            raise ValueError("extract computes activations from a model: leave shards= out")
        self.source, self.data, self.max_rows = data.source, data, max_rows
        self.extraction: Extraction | None = None

    def prepare_data(self) -> None:
        """See `ActivationDataModule`."""
        self.data.prepare_data()

    def setup(self, stage: str) -> None:  # noqa: ARG002
        """Load text and model for this rank."""
        self.data.trainer = self.trainer
        self.data.setup()
        site = self.source.site
        assert site is not None
        share = None if self.max_rows is None else -(-self.max_rows // site.ranks)
        self.extraction = self.source.extraction(share)

    def predict_dataloader(self) -> Extraction:
        """Model batches of rows."""
        if self.extraction is None:
            raise RuntimeError("extraction begins with setup: run it through trainer.predict")
        return self.extraction

    def teardown(self, stage: str) -> None:
        """Let go of the model."""
        self.data.teardown(stage)
        self.data.trainer = None


def run(
    data: ActivationDataModule,
    out: str,
    *,
    max_rows: int | None,
    shard_bytes: int,
    storage: str,
    nonfinite: str,
    plan: bool,
    **trainer: Any,
) -> Plan | None:
    """Write a cache, or go on with one; with `plan`, only say what it takes."""
    module = ExtractionDataModule(data, max_rows)
    if plan:
        module.setup("predict")
        assert module.extraction is not None
        estimate = module.extraction.plan(storage, shard_bytes)
        module.teardown("predict")
        return estimate
    writer = ShardPredictionWriter(
        out,
        shard_bytes=shard_bytes,
        storage=storage,
        nonfinite=nonfinite,  # type: ignore[arg-type]
    )
    L.Trainer(
        callbacks=[writer],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **trainer,
    ).predict(PassThrough(), datamodule=module, return_predictions=False)
    return None
