"""A tiny real model with its own tokenizer, and batches of its real activations."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from deeplens_lightning.hook_points import resolve
from deeplens_lightning.model import FrozenModel, load_tokenizer
from deeplens_lightning.packing import Blocks
from deeplens_lightning.sae import SparseAutoencoder
from deeplens_lightning.scaling import Moments, Scaling
from deeplens_lightning.text import document_hash

TEXTS = [text for _, text in sorted(pydoc_data.topics.topics.items())][:40]


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


@dataclass
class Rows:
    """Where rows came from."""

    document_hash: Tensor
    document_index: Tensor
    position: Tensor
    token_id: Tensor


class StandIn(L.LightningDataModule):
    """The face of the data module that callbacks look at, over a fixed matrix of activations."""

    def __init__(self, lm_folder: str, hook: str = "layers.1.mlp_act", n_batches: int = 12, batch: int = 64):
        super().__init__()
        self.hf_model, self.model_kwargs, self.batch_size = lm_folder, None, batch
        self.hook_names = (hook,)
        self.n_batches, self.seq_length, self.prepend_bos = n_batches, 64, None
        self.model: FrozenModel | None = None
        self.served: list[Tensor] = []
        self._rows: Tensor | None = None

    @property
    def d_in(self) -> int:
        return 32 if self.hook_names[0].endswith("_out") else 128

    def setup(self, stage: str) -> None:
        if self._rows is not None:
            return
        self.tokenizer = load_tokenizer(self.hf_model)
        points = resolve(GPT2Config.from_pretrained(self.hf_model), None, self.hook_names)
        self.model = FrozenModel.load(self.hf_model, points, device="cpu", isolation="padded")
        need = (self.n_batches + 2) * self.batch_size
        rows, provenance = [], []
        for document, text in enumerate(TEXTS):
            ids = self.tokenizer(text)["input_ids"][:64]
            rows.append(self.model.activations(torch.tensor([ids]))[self.hook_names[0]][0])
            provenance += [(document_hash(text), document, i, token) for i, token in enumerate(ids)]
        order = torch.randperm(len(provenance), generator=torch.Generator().manual_seed(0))[:need]
        self._rows = torch.cat(rows)[order]
        self._provenance = torch.tensor(provenance)[order]
        moments = Moments(self.d_in)
        moments.update(self._rows)
        self.scaling: Scaling = moments.scaling("standardize")

    def train_dataloader(self) -> Any:
        return _Batches(self, 0, self.n_batches)

    def val_dataloader(self) -> Any:
        return _Batches(self, self.n_batches, self.n_batches + 2)

    def provenance(self, batch: Tensor) -> Rows:
        return Rows(*self._origin[id(batch)].T)

    def document_tokens(self, index: int, document: int) -> list[int]:
        assert document_hash(TEXTS[index]) == document
        return list(self.tokenizer(TEXTS[index])["input_ids"])

    def heldout_blocks(self, n: int) -> Iterator[Blocks]:
        """Each block: two segments of different documents, a special token before the first, pads."""
        for number, text in enumerate(TEXTS[-n:]):
            ids = torch.tensor([0, *self.tokenizer(text)["input_ids"][:60]])
            block = Blocks.empty(1, 64)
            cut = len(ids) // 2
            block.tokens[0, : len(ids)] = ids
            block.positions[0, : len(ids)] = torch.cat([torch.arange(cut), torch.arange(len(ids) - cut)])
            block.documents[0, :cut], block.documents[0, cut : len(ids)] = 2 * number, 2 * number + 1
            block.keep[0, 1 : len(ids)] = True
            yield block

    def teardown(self, stage: str) -> None:
        pass


class _Batches:
    def __init__(self, dm: StandIn, start: int, stop: int):
        self.dm, self.start, self.stop = dm, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[Tensor]:
        dm = self.dm
        dm._origin = {}
        assert dm._rows is not None
        for i in range(self.start, self.stop):
            part = slice(i * dm.batch_size, (i + 1) * dm.batch_size)
            batch = dm.scaling.apply(dm._rows[part])
            dm._origin[id(batch)] = dm._provenance[part]
            dm.served.append(batch.clone())
            yield batch


class Shards(StandIn):
    """The same from a cache: no model is loaded."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.model = None


@pytest.fixture
def shards(lm_folder: str) -> Callable[[], StandIn]:
    """Makes data modules that serve rows without a model."""
    return lambda: Shards(lm_folder)


@dataclass
class Run:
    """What a short fit left."""

    trainer: L.Trainer
    sae: SparseAutoencoder
    datamodule: StandIn


def assert_undisturbed(plain: Run, watched: Run) -> None:
    """Both runs were served the same batches and ended with the same weights, bit for bit."""
    pairs = zip(plain.datamodule.served, watched.datamodule.served, strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)
    for name, value in plain.sae.state_dict().items():
        assert torch.equal(value, watched.sae.state_dict()[name]), name
    assert [m.training for m in plain.sae.modules()] == [m.training for m in watched.sae.modules()]


@pytest.fixture
def undisturbed() -> Callable[[Run, Run], None]:
    """Asserts that two runs did the same."""
    return assert_undisturbed


@pytest.fixture
def fit(lm_folder: str, tmp_path: Path) -> Any:
    """`fit(callbacks, **trainer_kwargs)`: a short real training on real activations."""

    def run(callbacks: list[L.Callback], *, datamodule: Any = None, sae: Any = None, **kwargs: Any) -> Run:
        dm = datamodule if datamodule is not None else StandIn(lm_folder)
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
        trainer = L.Trainer(callbacks=callbacks, **(options | kwargs))
        trainer.fit(sae, dm)
        return Run(trainer, sae, dm)

    return run
