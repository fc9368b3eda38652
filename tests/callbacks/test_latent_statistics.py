"""Firing counts are exact, on held-out rows and on sampled training rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from deeplens_lightning.callbacks import LatentStatistics


def test_heldout_counts_equal_encoding_the_heldout_rows(fit: Callable[..., Any], tmp_path: Path) -> None:
    run = fit([LatentStatistics(every_n_steps=4)])
    latest = json.loads((tmp_path / "run" / "latent_statistics" / "latest.json").read_text())
    run.datamodule.setup("fit")
    rows = torch.cat(list(run.datamodule.val_dataloader()))
    with torch.no_grad():
        fired = (run.sae.eval().encode(rows) > 0).sum(0)
    assert latest["heldout"]["rows"] == len(rows) == 128
    assert latest["heldout"]["counts"] == fired.tolist()
    assert latest["training"]["rows"] == 3 * 64  # steps 16, 20, 24: those since the last report
    metrics = run.trainer.callback_metrics
    dead = torch.tensor(latest["heldout"]["counts"]) == 0
    assert float(metrics["latents/dead_fraction"]) == pytest.approx(float(dead.float().mean()))
    assert float(metrics["latents/rows"]) == 128
    history = (tmp_path / "run" / "latent_statistics" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in history] == [12, 24]
    assert (tmp_path / "run" / "latent_statistics" / "step_00000024.png").exists()


def test_without_validation_training_rows_are_reported(fit: Callable[..., Any], tmp_path: Path) -> None:
    fit([LatentStatistics(every_n_steps=4)], limit_val_batches=0)
    latest = json.loads((tmp_path / "run" / "latent_statistics" / "latest.json").read_text())
    assert set(latest) == {"step", "sae", "training"}
    assert latest["training"]["rows"] == 6 * 64


def test_max_rows_bounds_the_heldout_rows(fit: Callable[..., Any], tmp_path: Path) -> None:
    fit([LatentStatistics(max_rows=10)])
    latest = json.loads((tmp_path / "run" / "latent_statistics" / "latest.json").read_text())
    assert latest["heldout"]["rows"] == 64


def test_the_histogram_reaches_tensorboard(fit: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    fit([LatentStatistics()], logger=logger)
    events = EventAccumulator(logger.log_dir).Reload()
    assert [event.step for event in events.Images("latents/firing_frequencies")] == [12, 24]
    assert [event.step for event in events.Scalars("latents/dense_fraction")] == [12, 24]


def test_batches_and_weights_are_bit_identical_with_and_without_it(
    fit: Callable[..., Any], undisturbed: Callable[..., None]
) -> None:
    undisturbed(fit([]), fit([LatentStatistics(every_n_steps=1)]))


def test_values_outside_their_range_are_refused() -> None:
    with pytest.raises(ValueError, match="dense_above=0"):
        LatentStatistics(dense_above=0)
    with pytest.raises(ValueError, match="max_rows=-1"):
        LatentStatistics(max_rows=-1)
    with pytest.raises(ValueError, match="every_n_steps=0"):
        LatentStatistics(every_n_steps=0)
