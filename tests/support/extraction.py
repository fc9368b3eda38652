"""Extract the activations of a tiny model into a cache of shards, on one rank or several."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L

from deeplens_lightning.extraction.shard_prediction_writer import (
    ExtractionData,
    PassThrough,
    ShardPredictionWriter,
)
from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.model.hook_points import resolve
from deeplens_lightning.model.pretrained import load_config, load_tokenizer
from deeplens_lightning.stream.document_order import Extraction
from deeplens_lightning.stream.row_identity import row_identity
from deeplens_lightning.text.documents import Documents
from deeplens_lightning.text.packing import Packing
from deeplens_lightning.text.pipeline import TextStage
from deeplens_lightning.text.sources import open_source
from deeplens_lightning.text.tokens import special_affixes
from tests.support.training import trainer

SEQ_LENGTH = 48


class TinyDataModule(ExtractionData):
    """What `ShardPredictionWriter` needs of a data module."""

    def __init__(self, model: str, dataset: str, **kwargs: Any) -> None:
        super().__init__()
        self.model, self.dataset, self.kwargs = model, dataset, kwargs

    def setup(self, stage: str) -> None:
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        self.extraction = make_extraction(self.model, self.dataset, rank=rank, ranks=ranks, **self.kwargs)

    def predict_dataloader(self) -> Extraction | None:
        return self.extraction


def make_extraction(
    model: str, dataset: str, *, rank: int = 0, ranks: int = 1, hook: str = "mlp_out", **kwargs: Any
) -> Extraction:
    config = load_config(model)
    tokenizer = load_tokenizer(model)
    prefix, suffix = special_affixes(tokenizer, None)
    documents = Documents(
        source=open_source(dataset), split="train", val_fraction=0.0, seed=0, rank=rank, ranks=ranks
    )
    frozen = FrozenModel.load(model, resolve(config, [1, 2], hook), device="cpu", seq_length=SEQ_LENGTH)
    text = TextStage(
        documents=documents,
        tokenizer=tokenizer,
        packing=Packing(seq_length=SEQ_LENGTH, blocks=32, prefix=prefix, suffix=suffix),
    )
    return Extraction(
        model=frozen,
        text=text,
        inference_batch_size=4,
        identity=row_identity(frozen, text, inference_batch_size=4, compiled=False),
        config={},
        **kwargs,
    )


class StopAfter(L.Callback):
    """Block as soon as the folder holds `files` sidecars and other JSON files, so that a kill comes before the end."""

    def __init__(self, folder: Path, files: int) -> None:
        self.folder, self.files = folder, files

    def on_predict_batch_end(self, *_: Any, **__: Any) -> None:
        if len(list(self.folder.glob("*.json"))) >= self.files:
            time.sleep(3600)


def extract(
    rank: int, ranks: int, folder: str, model: str, dataset: str, stop_after: int | None = None
) -> None:
    """Extract `layers.1.mlp_out` and `layers.2.mlp_out` into `folder`, as one of `ranks` ranks.

    Args:
        rank: number of this rank.
        ranks: how many there are.
        folder: where shards are written.
        model: folder of the model.
        dataset: file of texts.
        stop_after: the number of JSON files at which the process blocks until it is killed.
    """
    callbacks: list[L.Callback] = [ShardPredictionWriter(folder, shard_bytes=200_000, show_progress=False)]
    if stop_after is not None:
        callbacks.append(StopAfter(Path(folder), stop_after))
    strategy = "ddp" if ranks > 1 else "auto"
    run = trainer(folder, callbacks=callbacks, devices=ranks, strategy=strategy)
    run.predict(PassThrough(), datamodule=TinyDataModule(model, dataset), return_predictions=False)
