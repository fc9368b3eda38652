"""Text, data modules and recordings for the tests of resuming, of ranks and of the contract with Lightning."""

from __future__ import annotations

import pydoc_data.topics
from itertools import islice
from typing import Any

import lightning as L
import torch
from torch import Tensor

from deeplens_lightning.datamodule import ActivationDataModule
from deeplens_lightning.sae import SparseAutoencoder

END = "<|endoftext|>"


def texts(count: int, most: int = 500) -> list[str]:
    """Real English, some of it empty, of lengths from a few characters to `most`."""
    whole = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    found, at = [], 0
    for i in range(count):
        length = 10 + (i * 7919) % most
        found.append(whole[at : at + length])
        at += length
    return [*found[:3], "", *found[3:7], " \n\t", *found[7:]][:count]


def data(hf_model: Any, dataset: Any = None, **changes: Any) -> ActivationDataModule:
    """A small stream: 32-token blocks, batches of 16 rows, a buffer of 96."""
    settings: dict[str, Any] = {
        "layer": 1,
        "hook": "mlp_act",
        "seq_length": 32,
        "inference_batch_size": 2,
        "batch_size": 16,
        "buffer_size": 96,
        "val_fraction": 0.2,
        "val_rows": 64,
        "device": "cpu",
    }
    return ActivationDataModule(hf_model, dataset_name=dataset or texts(60), **(settings | changes))


def take(dm: ActivationDataModule, count: int) -> list[tuple[Any, Tensor]]:
    """The next batches, over epochs if need be, with their provenance; no Trainer."""
    found: list[tuple[Any, Tensor]] = []
    while len(found) < count:
        batches = islice(dm.train_dataloader(), count - len(found))
        found.extend((batch, provenance(dm, batch)) for batch in batches)
    return found


def provenance(dm: ActivationDataModule, batch: Any) -> Tensor:
    """int64 `(batch, 4)`."""
    known = dm.provenance(batch)
    assert known is not None
    return torch.stack([known.document_hash, known.document_index, known.position, known.token_id], 1)


def same(a: Any, b: Any) -> bool:
    """Bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    return torch.equal(a, b)


def assert_same(found: list[tuple[Any, Tensor]], expected: list[tuple[Any, Tensor]]) -> None:
    """The same batches of the same rows, in the same order."""
    assert len(found) == len(expected)
    wrong = [
        i
        for i, (a, b) in enumerate(zip(found, expected, strict=True))
        if not (same(a[0], b[0]) and torch.equal(a[1], b[1]))
    ]
    assert not wrong, f"batches {wrong} differ"


class Recorder(L.Callback):
    """Keeps every batch that was trained on, and where its rows came from."""

    def __init__(self) -> None:
        self.batches: list[tuple[Any, Tensor]] = []
        self.losses: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        kept = {k: v.clone() for k, v in batch.items()} if isinstance(batch, dict) else batch.clone()
        self.batches.append((kept, provenance(trainer.datamodule, batch)))

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))


def sae(dm: ActivationDataModule, **changes: Any) -> SparseAutoencoder:
    """A small TopK SAE, the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SparseAutoencoder(d_in=dm.d_in, **({"d_sae": 64, "k": 4, "dead_after_tokens": 400} | changes))


def trainer(folder: Any, recorder: Recorder | None = None, callbacks: Any = (), **changes: Any) -> L.Trainer:
    """A quiet Trainer on one CPU."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "default_root_dir": folder,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 2,
    }
    if any(isinstance(callback, L.pytorch.callbacks.Checkpoint) for callback in callbacks):
        settings["enable_checkpointing"] = True
    return L.Trainer(callbacks=[*([recorder] if recorder else []), *callbacks], **(settings | changes))
