"""Between logging steps no callback waits for an accelerator or meets a tensor of another device."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from deeplens_lightning.activation_data import ActivationData
from deeplens_lightning.callbacks import ExtractSingleSample, LatentStatistics, TopActivatingTokens
from deeplens_lightning.normalization import Scaling
from deeplens_lightning.sae import SparseAutoencoder, SparseAutoencoderGrid
from deeplens_lightning.types import Provenance
from tests.callbacks.test_float64_refused import EVERY
from tests.support.fake_accelerator import fake_accelerator, forked, moved, refuse_copies

D_IN, ROWS, STEPS = 16, 64, 17  # kept rows are encoded again at every 16th batch


class _Shifted(Scaling):
    is_identity = False  # reading it waits for no accelerator, but a fake CPU tensor has no values


class _Data(ActivationData):
    """Normalised rows of one hook point, with provenance on the CPU, as a data module serves them."""

    hook_names = ("layers.1.mlp_act",)
    scaling = _Shifted(torch.arange(D_IN).float(), torch.full((D_IN,), 2.0))

    def __init__(self) -> None:
        where = torch.arange(ROWS)
        self.where = Provenance(where, where, where, where)

    def provenance(self, batch: Any) -> Provenance:
        return self.where


class _Trainer(SimpleNamespace):
    """What callbacks read of a Trainer at the end of a batch."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            datamodule=_Data(),
            global_step=0,
            is_global_zero=True,
            world_size=1,
            log_every_n_steps=10_000,
            train_dataloader=None,
            loggers=[],
            logger=None,
            default_root_dir=str(folder),
            log_dir=str(folder),
            strategy=SimpleNamespace(broadcast=lambda x: x),
            callbacks=[],
            sanity_checking=False,
            _accelerator_connector=SimpleNamespace(cluster_environment=None),
        )


def _module(kind: str) -> L.LightningModule:
    settings: dict[str, Any] = {"d_sae": 64, "architecture": kind if kind != "grid" else "topk"}
    return (
        SparseAutoencoderGrid(D_IN, {"k": [2, 4]}, {"d_sae": 64})
        if kind == "grid"
        else SparseAutoencoder(D_IN, k=4, **settings)
    )


@pytest.mark.parametrize("kind", ["topk", "batch_topk", "jumprelu", "grid"])
@forked
def test_no_callback_waits_between_logging_steps(kind: str, tmp_path: Path) -> None:
    module = _module(kind)
    every = {name: make() for name, make in EVERY.items()} | {
        "LatentStatistics": LatentStatistics(every_n_steps=1),
        "TopActivatingTokens": TopActivatingTokens(latents=8, every_n_steps=1),
        "ExtractSingleSample": ExtractSingleSample(texts=["a"], every_n_steps=10_000),
    }
    run: Any = _Trainer(tmp_path)

    def batch_end(x: Tensor) -> None:
        run.global_step += 1
        for callback in every.values():
            callback.on_train_batch_start(run, module, x, run.global_step)
            callback.on_train_batch_end(run, module, None, x, run.global_step)

    for callback in every.values():
        callback.setup(run, module, "fit")
    with fake_accelerator() as device:
        moved(module, device)
        batch_end(torch.randn(ROWS, D_IN, device=device))  # the first batch copies the normalisation
        with refuse_copies():
            for _ in range(STEPS):
                batch_end(torch.randn(ROWS, D_IN, device=device))
