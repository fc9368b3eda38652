"""A tiny real model with its own tokenizer, and short real trainings on its activations."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from deeplens_lightning.datamodule import ActivationDataModule
from deeplens_lightning.sae import SparseAutoencoder

TEXTS = [text for _, text in sorted(pydoc_data.topics.topics.items())][:40]


@pytest.fixture
def texts() -> list[str]:
    """The documents that runs train on."""
    return TEXTS


@pytest.fixture(scope="session")
def lm_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random GPT-2-shaped model (4 layers of 32, 64 positions) and a BPE tokenizer."""
    folder = tmp_path_factory.mktemp("lm")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(TEXTS, vocab_size=600, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=4,
        n_embd=32,
        n_head=2,
        n_positions=64,
        vocab_size=600,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    torch.set_rng_state(generator_state)
    return str(folder)


class Shards(ActivationDataModule):
    """The same rows without model and held-out text, as cached shards serve them."""

    @property
    def model(self) -> None:
        return None

    def heldout_blocks(self, rows: int) -> None:  # type: ignore[override]
        return None


def make(kind: type[ActivationDataModule], **kwargs: Any) -> ActivationDataModule:
    options: dict[str, Any] = {
        "layer": 1,
        "hook": "mlp_act",
        "dataset_name": TEXTS,
        "seq_length": 64,
        "batch_size": 64,
        "inference_batch_size": 2,
        "buffer_size": 256,
        "max_tokens": 12 * 64,
        "val_fraction": 0.2,
        "val_rows": 128,
        "device": "cpu",
    }
    return kind(**(options | kwargs))


@pytest.fixture
def live(lm_folder: str) -> Callable[..., ActivationDataModule]:
    """Make a data module with 12 batches of 64 rows in an epoch, and 128 held-out rows."""
    return lambda **kwargs: make(ActivationDataModule, **({"hf_model": lm_folder} | kwargs))


@pytest.fixture
def shards(lm_folder: str) -> Callable[..., ActivationDataModule]:
    """Make a data module that serves rows and has no model and no text."""
    return lambda **kwargs: make(Shards, **({"hf_model": lm_folder} | kwargs))


class Recorder(L.Callback):
    """Store every training batch and the provenance of its rows."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []
        self.provenance: list[Tensor] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(torch.cat(list(batch.values()), 1) if isinstance(batch, dict) else batch.clone())
        self.provenance.append(trainer.datamodule.provenance(batch).stacked())


@dataclass
class Run:
    """Results of a short fit."""

    trainer: L.Trainer
    sae: SparseAutoencoder
    datamodule: ActivationDataModule
    batches: list[Tensor]
    provenance: Tensor


def assert_undisturbed(plain: Run, watched: Run) -> None:
    """Check that both runs had the same batches and end with the same weights, bit for bit."""
    pairs = zip(plain.batches, watched.batches, strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)
    for name, value in plain.sae.state_dict().items():
        assert torch.equal(value, watched.sae.state_dict()[name]), name
    assert [m.training for m in plain.sae.modules()] == [m.training for m in watched.sae.modules()]


@pytest.fixture
def undisturbed() -> Callable[[Run, Run], None]:
    """A check that two runs are equal bit for bit."""
    return assert_undisturbed


@pytest.fixture
def fit(lm_folder: str, tmp_path: Path) -> Any:
    """`fit(callbacks, **trainer_kwargs)`: a short real training on real activations."""

    def run(callbacks: list[L.Callback], *, datamodule: Any = None, sae: Any = None, **kwargs: Any) -> Run:
        dm = datamodule if datamodule is not None else make(ActivationDataModule, hf_model=lm_folder)
        L.seed_everything(0, verbose=False)
        sae = sae if sae is not None else SparseAutoencoder(d_in=dm.d_in, d_sae=256, k=8)
        options: dict[str, Any] = {
            "max_epochs": 2,
            "accelerator": "cpu",
            "logger": False,
            "default_root_dir": tmp_path / "run",
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 5,
            "num_sanity_val_steps": 1,
        }
        recorder = Recorder()
        trainer = L.Trainer(callbacks=[recorder, *callbacks], **(options | kwargs))
        trainer.fit(sae, dm)
        return Run(trainer, sae, dm, recorder.batches, torch.cat(recorder.provenance))

    return run
