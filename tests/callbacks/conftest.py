"""A tiny model with a tokenizer, and short trainings on its activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from deeplens_lightning.datamodule import ActivationDataModule
from deeplens_lightning.sae import SparseAutoencoder
from tests.support.models import save_model
from tests.support.recorder import Recorder
from tests.support.texts import texts as english
from tests.support.training import data, trainer

TEXTS = english(40, 10_000)


@pytest.fixture
def texts() -> list[str]:
    """The documents that runs train on."""
    return TEXTS


@pytest.fixture(scope="session")
def lm_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random GPT-2 (4 layers, 32 wide, 64 positions) and a tokenizer."""
    return str(save_model(tmp_path_factory.mktemp("lm"), "gpt2", layers=4, positions=64))


class Shards(ActivationDataModule):
    """The same rows, but without a model and held-out text, as with cached shards."""

    @property
    def model(self) -> None:
        return None

    def heldout_blocks(self, rows: int) -> None:  # type: ignore[override]
        return None


make = partial(
    data,
    dataset=TEXTS,
    seq_length=64,
    batch_size=64,
    buffer_size=256,
    max_tokens=12 * 64,
    val_rows=128,
)


@pytest.fixture
def live(lm_folder: str) -> Callable[..., ActivationDataModule]:
    """Make a data module with 12 batches of 64 rows in an epoch, and 128 held-out rows."""
    return lambda **kwargs: make(**({"hf_model": lm_folder} | kwargs))


@pytest.fixture
def shards(lm_folder: str) -> Callable[..., ActivationDataModule]:
    """Make a data module that serves rows and has no model and no text."""
    return lambda **kwargs: make(**({"hf_model": lm_folder, "kind": Shards} | kwargs))


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

    def run(
        callbacks: list[L.Callback],
        *,
        datamodule: Any = None,
        sae: Any = None,
        record: bool = True,
        **kwargs: Any,
    ) -> Run:
        dm = datamodule if datamodule is not None else make(lm_folder)
        L.seed_everything(0, verbose=False)
        sae = sae if sae is not None else SparseAutoencoder(d_in=dm.d_in, d_sae=256, k=8)
        options: dict[str, Any] = {"max_epochs": 2, "log_every_n_steps": 5, "num_sanity_val_steps": 1}
        recorder = Recorder()
        fitting = trainer(tmp_path / "run", recorder if record else None, callbacks, **(options | kwargs))
        fitting.fit(sae, dm)
        batches = [torch.cat(list(x.values()), 1) if isinstance(x, dict) else x for x, _ in recorder.batches]
        return Run(
            fitting,
            sae,
            dm,
            batches,
            torch.cat([torch.empty(0, 4, dtype=torch.int64), *(rows for _, rows in recorder.batches)]),
        )

    return run
