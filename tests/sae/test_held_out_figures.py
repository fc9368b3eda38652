"""Held-out figures are those of raw rows, whatever the batches, the ranks and the normalisation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deeplens_lightning.datamodule import ActivationDataModule
from deeplens_lightning.sae import SparseAutoencoder
from tests.support.caches import WIDE, write_cache
from tests.support.ranks import launch
from tests.support.training import data, sae, trainer

VAL_ROWS = 151
"""No multiple of the batch sizes, of the ranks or of the rows in a model batch."""


def module(kind: str, place: str, **changes: Any) -> ActivationDataModule:
    """A data module that computes rows with the model, or reads the cache, at `place`."""
    if kind == "live":
        return data(place, val_rows=VAL_ROWS, **changes)
    settings = {"shards": place, "hook": WIDE, "batch_size": 16, "val_fraction": 0.2, "val_rows": VAL_ROWS}
    return ActivationDataModule(**(settings | changes))


def trained(kind: str, place: str, folder: Path) -> Path:
    """A checkpoint of an SAE that was trained on rows with another scale and shift in every dimension."""
    dm = module(kind, place, normalize="zscore")
    run = trainer(folder, max_steps=20)
    run.fit(sae(dm), dm)
    run.save_checkpoint(folder / "sae.ckpt")
    return folder / "sae.ckpt"


def figures(
    rank: int, ranks: int, kind: str, place: str, checkpoint: Path, **changes: Any
) -> dict[str, float]:
    """The held-out figures of a checkpoint on one of `ranks` ranks."""
    strategy = {"strategy": "ddp"} if ranks > 1 else {}
    run = trainer(checkpoint.parent, devices=ranks, **strategy)
    autoencoder = SparseAutoencoder.load_from_checkpoint(checkpoint)
    [found] = run.validate(autoencoder, module(kind, place, **changes), verbose=False)
    return dict(found)


def offline(kind: str, place: str, checkpoint: Path) -> dict[str, float]:
    """The same from all raw rows at once, in float64."""
    dm = module(kind, place)
    dm.setup("validate")
    x = torch.cat(list(dm.val_dataloader()))
    dm.teardown("validate")
    autoencoder = SparseAutoencoder.load_from_checkpoint(checkpoint)
    with torch.no_grad():
        latents, made = autoencoder.encode(x), autoencoder(x).double()
    x = x.double()

    def mean(values: Tensor) -> float:
        return float(values.mean())

    error = (x - made).square().sum(1)
    return {
        "val/fvu": float(error.sum() / (x - x.mean(0)).square().sum()),
        "val/mse": mean(error),
        "val/cosine": mean(torch.cosine_similarity(x, made)),
        "val/shrinkage": float(made.square().sum() / (x * made).sum()),
        "val/l0": mean((latents > 0).sum(1).double()),
        "val/rows": len(x),
    }


@pytest.fixture(scope="module", params=["live", "cached"])
def run(
    request: pytest.FixtureRequest, tiny: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, str, Path]:
    kind: str = request.param
    place, folder = tiny("gpt2"), tmp_path_factory.mktemp(kind)
    if kind == "cached":
        place = str(folder / "cache")
        write_cache(place)
    return kind, place, trained(kind, place, folder)


def check(found: dict[str, float], expected: dict[str, float]) -> None:
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "changes", [{}, {"normalize": "mean_norm"}, {"normalize": "zscore", "batch_size": 50}], ids=str
)
def test_figures_equal_offline_sums_over_raw_rows(
    run: tuple[str, str, Path], changes: dict[str, Any]
) -> None:
    expected = offline(*run)
    assert expected["val/rows"] == VAL_ROWS
    check(figures(0, 1, *run, **changes), expected)


def _of_rank(rank: int, ranks: int, *run: Any) -> dict[str, float]:
    return figures(rank, ranks, *run, normalize="zscore", batch_size=32)


@pytest.mark.slow
def test_figures_are_the_same_on_several_ranks(run: tuple[str, str, Path]) -> None:
    expected = offline(*run)
    for found in launch(2, _of_rank, *run):
        check(found, expected)
