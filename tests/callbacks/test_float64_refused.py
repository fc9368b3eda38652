"""Every callback runs where there is no float64, as on MPS."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from deeplens_lightning import callbacks
from deeplens_lightning.callbacks import (
    ExportSAE,
    ExtractSingleSample,
    FitSummary,
    LatentPredictionWriter,
    LatentStatistics,
    LossRecovered,
    Preemption,
    StreamStatistics,
    Throughput,
    TopActivatingTokens,
)
from tests.support.refusing_float64 import RefusingFloat64, refusing

EVERY: dict[str, Callable[[], L.Callback]] = {
    "ExportSAE": lambda: ExportSAE("safetensors"),  # SAELens's layout is folded in float64, on the CPU
    "ExtractSingleSample": lambda: ExtractSingleSample(texts=["The cat sat."], every_n_steps=4),
    "FitSummary": FitSummary,
    "LatentPredictionWriter": lambda: LatentPredictionWriter("unused"),  # it writes in `predict` alone
    "LatentStatistics": lambda: LatentStatistics(every_n_steps=3),
    "LossRecovered": lambda: LossRecovered(100),
    "Preemption": Preemption,
    "StreamStatistics": StreamStatistics,
    "Throughput": Throughput,
    "TopActivatingTokens": lambda: TopActivatingTokens(latents=16, keep=3, every_n_steps=1),
}


def test_the_list_holds_every_callback() -> None:
    assert sorted(EVERY) == sorted(callbacks.__all__)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_every_callback_makes_no_float64_tensor(
    precision: str, fit: Callable[..., Any], live: Callable[..., Any], tmp_path: Path
) -> None:
    watched = [refusing(make()) for make in EVERY.values()]
    logger = CSVLogger(tmp_path)
    data = live(normalize="standardize")
    fit(watched, datamodule=data, logger=logger, log_every_n_steps=4, max_epochs=1, precision=precision)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.double(),
        lambda x: x.sum(dtype=torch.float64),
        lambda x: x[0].double(),
        lambda x: torch.zeros(3, dtype=torch.float64),
        lambda x: torch.arange(3) / torch.tensor([2.0], dtype=torch.float64),
    ],
)
def test_the_mode_refuses_what_mps_refuses(make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with RefusingFloat64(), pytest.raises(TypeError, match="makes a float64 tensor"):
        make(torch.ones(3))


def test_the_mode_lets_numbers_of_python_pass() -> None:
    with RefusingFloat64():
        x = torch.ones(3) * 0.1 + float(torch.tensor(0.25, dtype=torch.float64))
    assert x.dtype == torch.float32
