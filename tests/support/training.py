"""Small data modules, SAEs and Trainers, for tests that train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import lightning as L
import torch

from deeplens_lightning.datamodule import ActivationDataModule
from deeplens_lightning.sae import SparseAutoencoder
from deeplens_lightning.shards.format import ADDED_ENTRIES
from deeplens_lightning.stream.checkpoint import DataState
from tests.support.recorder import Recorder
from tests.support.texts import texts


def data(
    hf_model: Any,
    dataset: Any = None,
    *,
    kind: type[ActivationDataModule] = ActivationDataModule,
    **changes: Any,
) -> ActivationDataModule:
    """A data module with segments of 32 tokens, batches of 16 rows and a buffer of 96 rows.

    Args:
        hf_model: a folder or a loaded model.
        dataset: 60 texts if it is not given.
        kind: the class of the data module.
        changes: settings that differ.
    """
    settings: dict[str, Any] = {
        "layer": 1,
        "hook": "mlp_act",
        "dataset_name": texts(60) if dataset is None else dataset,
        "seq_length": 32,
        "inference_batch_size": 2,
        "batch_size": 16,
        "buffer_size": 96,
        "val_fraction": 0.2,
        "val_rows": 64,
        "device": "cpu",
    }
    return kind(hf_model, **(settings | changes))


def sae(datamodule: ActivationDataModule, **changes: Any) -> SparseAutoencoder:
    """A small TopK SAE with the same initial weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = {"d_sae": 64, "k": 4, "dead_after_tokens": 400}
        return SparseAutoencoder(d_in=datamodule.d_in, **(settings | changes))


def trainer(
    folder: Any, recorder: Recorder | None = None, callbacks: Sequence[L.Callback] = (), **changes: Any
) -> L.Trainer:
    """A Trainer on one CPU without output, loggers or checkpoints (but with those of a given callback)."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "default_root_dir": folder,
        "enable_checkpointing": any(
            isinstance(callback, L.pytorch.callbacks.Checkpoint) for callback in callbacks
        ),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(callbacks=[*([recorder] if recorder else []), *callbacks], **(settings | changes))


def of_an_earlier_release(state: dict[str, Any]) -> dict[str, Any]:
    """The same state of a data module without the entries that earlier releases did not record."""
    read = DataState.from_state(state)
    kept = {name: value for name, value in read.fingerprint.items() if name not in ADDED_ENTRIES}
    return replace(read, fingerprint=kept).to_state()
