"""Callbacks that run a model refuse rows that are not its own before the first step of a fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from deeplens_lightning.callbacks import ExtractSingleSample, LossRecovered
from deeplens_lightning.datamodule import ActivationDataModule

TEXTS = ["The cat sat on the mat."]
CALLBACKS: dict[str, Callable[[str], L.Callback]] = {
    "LossRecovered": lambda model: LossRecovered(texts=TEXTS, hf_model=model),
    "ExtractSingleSample": lambda model: ExtractSingleSample(model, texts=TEXTS),
}


@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.parametrize(
    ("width", "given", "match"),
    [
        (
            20,
            {"layer": 1, "hook": "mlp_out"},
            "are 20 wide, and those of layers.1.mlp_out in its model are 32",
        ),
        (32, {}, "hook point"),
    ],
    ids=["another width", "unknown hook point"],
)
def test_a_model_that_cannot_have_computed_the_rows_is_refused_before_training(
    name: str,
    width: int,
    given: dict[str, Any],
    match: str,
    fit: Callable[..., Any],
    lm_folder: str,
    tmp_path: Path,
) -> None:
    torch.save(torch.randn(400, width), tmp_path / "rows.pt")
    data = ActivationDataModule(shards=str(tmp_path / "rows.pt"), batch_size=64, **given)

    class NoStep(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            pytest.fail("a step was trained")

    with pytest.raises(ValueError, match=match):
        fit([CALLBACKS[name](lm_folder), NoStep()], datamodule=data, num_sanity_val_steps=0)
