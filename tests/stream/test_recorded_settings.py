"""Loggers and checkpoints show the settings of the data module under one name of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.tuner import Tuner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from transformers import AutoModel, AutoTokenizer

from deeplens_lightning.datamodule import ActivationDataModule
from deeplens_lightning.options import ModelOptions, TextOptions
from tests.support.texts import texts
from tests.support.training import data, sae, trainer


class OwnModule(L.LightningModule):
    """A module that saves arguments with names of the data module's settings."""

    def __init__(self, batch_size: int, seed: int, d_in: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.mean = torch.nn.Parameter(torch.zeros(d_in))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return ((batch - self.mean) ** 2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def logged(logger: Logger, settings: str = "data") -> dict[str, Any]:
    """The hyperparameters that a logger wrote to disk; those of the data module are under the name `settings`."""
    assert logger.log_dir is not None  # type: ignore[attr-defined]
    folder = Path(logger.log_dir)  # type: ignore[attr-defined]
    if isinstance(logger, CSVLogger):
        found = yaml.safe_load((folder / "hparams.yaml").read_text())
        return {f"{settings}/{name}": x for name, x in found.pop(settings).items()} | found
    events = EventAccumulator(str(folder)).Reload()
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    written = HParamsPluginData.FromString(content).session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in written.items()}


LOGGERS = {
    "csv": lambda folder: CSVLogger(folder / "logs"),
    "tensorboard": lambda folder: TensorBoardLogger(folder / "logs"),
}


@pytest.mark.parametrize("kind", LOGGERS)
def test_seeds_of_data_and_sae_may_differ_and_are_both_logged(
    kind: str, tiny: Callable[[str], str], tmp_path: Path
) -> None:
    dm = data(tiny("gpt2"), seed=3)
    autoencoder, logger = sae(dm, seed=1), LOGGERS[kind](tmp_path)
    trainer(tmp_path, max_steps=2, logger=logger).fit(autoencoder, dm)
    found = logged(logger)
    assert (found["data/seed"], found["seed"]) == (3, 1)
    assert found["data/hf_model"] == tiny("gpt2")


@pytest.mark.parametrize("kind", LOGGERS)
def test_a_module_may_save_a_batch_size_of_its_own(
    kind: str, tiny: Callable[[str], str], tmp_path: Path
) -> None:
    dm, logger = data(tiny("gpt2")), LOGGERS[kind](tmp_path)
    assert isinstance(dm.d_in, int)
    trainer(tmp_path, max_steps=2, logger=logger).fit(OwnModule(7, 5, dm.d_in), dm)
    found = logged(logger)
    assert (found["data/batch_size"], found["batch_size"], found["seed"]) == (16, 7, 5)


class OwnData(OwnModule):
    """A module with a hyperparameter of the name that the settings of the data module have."""

    def __init__(self, data: Any, d_in: int) -> None:
        super().__init__(7, 5, d_in)
        self.save_hyperparameters("data")


@pytest.mark.parametrize("kind", LOGGERS)
@pytest.mark.parametrize("value", ["fineweb", {"seed": 9}])
def test_a_module_may_save_data_of_its_own(
    value: Any, kind: str, tiny: Callable[[str], str], tmp_path: Path
) -> None:
    dm, logger, keep = data(tiny("gpt2")), LOGGERS[kind](tmp_path), ModelCheckpoint(tmp_path / "kept")
    assert isinstance(dm.d_in, int)
    trainer(tmp_path, None, [keep], max_steps=2, logger=logger).fit(OwnData(value, dm.d_in), dm)
    found = logged(logger, "activation_data")
    assert (found["activation_data/seed"], found["activation_data/batch_size"]) == (0, 16)
    if isinstance(value, dict) and kind == "tensorboard":
        assert found["data/seed"] == 9
    else:
        assert found["data"] == value
    checkpoint = torch.load(keep.best_model_path, weights_only=True)
    assert set(checkpoint["datamodule_hyper_parameters"]) == {"data"}
    assert checkpoint["hyper_parameters"]["data"] == value


def test_checkpoints_hold_names_of_models_and_datasets_and_no_secrets(
    tiny: Callable[[str], str], tmp_path: Path
) -> None:
    folder = tiny("gpt2")
    dm = data(
        AutoModel.from_pretrained(folder),
        datasets.Dataset.from_dict({"text": texts(60)}),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        model_options=ModelOptions(kwargs={"dtype": torch.float32, "token": "hf_secret"}),
        text_options=TextOptions(test_fraction=0.1),
    )
    keep = ModelCheckpoint(tmp_path / "kept")
    trainer(tmp_path, None, [keep], max_steps=2).fit(sae(dm), dm)
    checkpoint = torch.load(keep.best_model_path, weights_only=True)
    assert set(checkpoint["datamodule_hyper_parameters"]) == {"data"}
    found = checkpoint["datamodule_hyper_parameters"]["data"]
    assert found["hf_model"] == f"GPT2Model {folder}"
    assert found["dataset_name"] == "Dataset of 60 rows"
    assert found["tokenizer"].endswith(folder)
    assert found["model_options"]["kwargs"] == {"dtype": "torch.float32", "token": "not recorded"}
    assert found["text_options"]["test_fraction"] == 0.1
    assert json.loads(json.dumps(found)) == found
    assert "seed" in checkpoint["hyper_parameters"]
    assert "data" not in checkpoint["hyper_parameters"]


def test_lists_of_texts_are_recorded_as_their_number() -> None:
    assert ActivationDataModule(dataset_name=texts(5)).hparams["data"]["dataset_name"] == "list of 5 texts"


def test_a_data_module_may_be_made_inside_a_subclass_with_other_arguments() -> None:
    class Own(ActivationDataModule):
        def __init__(self, size: int) -> None:
            super().__init__(batch_size=size)

    assert Own(64).hparams["data"]["batch_size"] == 64


def test_a_batch_size_that_was_found_is_the_one_in_the_checkpoint(
    tiny: Callable[[str], str], tmp_path: Path
) -> None:
    dm = data(tiny("gpt2"))
    run, autoencoder = trainer(tmp_path, max_steps=2), sae(dm)
    Tuner(run).scale_batch_size(autoencoder, datamodule=dm, steps_per_trial=1, init_val=16, max_trials=2)
    run.fit(autoencoder, dm)
    run.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert dm.batch_size == 32
    assert saved["datamodule_hyper_parameters"]["data"]["batch_size"] == 32
