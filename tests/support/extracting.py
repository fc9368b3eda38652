"""A tiny random GPT-2 with a tokenizer of its own and a few hundred texts, for the tests of extraction."""

from __future__ import annotations

import json
import os
import pydoc_data.topics
from pathlib import Path
from typing import Any

import lightning as L
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from deeplens_lightning.extraction.shard_prediction_writer import (
    ExtractionData,
    PassThrough,
    ShardPredictionWriter,
)
from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.model.hook_points import resolve
from deeplens_lightning.model.pretrained import load_config, load_tokenizer
from deeplens_lightning.stream.document_order import Extraction
from deeplens_lightning.text.documents import Documents
from deeplens_lightning.text.packing import Packing
from deeplens_lightning.text.pipeline import TextStage
from deeplens_lightning.text.sources import open_source
from deeplens_lightning.text.tokens import special_affixes

SEQ_LENGTH = 48


def texts(n: int = 150) -> list[str]:
    """Paragraphs of the Python manual, some of them empty, of very different lengths."""
    found: list[str] = []
    for topic in sorted(pydoc_data.topics.topics):
        paragraphs = pydoc_data.topics.topics[topic].split("\n\n")
        found += ["\n\n".join(paragraphs[i : i + 1 + i % 4]) for i in range(0, len(paragraphs), 4)]
    found = found[: n - 2]
    return [*found[:5], "", *found[5:20], "  \n", *found[20:]]


def write_texts(path: Path, n: int = 150) -> Path:
    path.write_text("".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in texts(n)))
    return path


def save_model(folder: Path, bos: bool = False, layers: int = 3, positions: int = 128) -> Path:
    """A small GPT-2; with `bos`, its tokenizer begins every text with <|endoftext|>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=400, n_positions=positions, n_embd=64, n_layer=layers, n_head=4)
        GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


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
    return Extraction(
        model=FrozenModel.load(model, resolve(config, [1, 2], hook), device="cpu", seq_length=SEQ_LENGTH),
        text=TextStage(
            documents=documents,
            tokenizer=tokenizer,
            packing=Packing(seq_length=SEQ_LENGTH, blocks=32, prefix=prefix, suffix=suffix),
        ),
        inference_batch_size=4,
        config={},
        **kwargs,
    )


def main(folder: str, model: str, dataset: str, ranks: int, rank: int = 0, port: int = 0) -> None:
    """Extract in this process, as one of several that torchrun could have started."""
    if ranks > 1:
        given = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "GROUP_RANK": 0,
            "WORLD_SIZE": ranks,
            "LOCAL_WORLD_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "TORCHELASTIC_RUN_ID": "test",
        }
        os.environ.update({name: str(value) for name, value in given.items()})
    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ShardPredictionWriter(folder, shard_bytes=200_000, show_progress=False)],
    )
    trainer.predict(PassThrough(), datamodule=TinyDataModule(model, dataset), return_predictions=False)
