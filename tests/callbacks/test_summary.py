"""The summary table, its file and the curves hold what a fit measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.strategies import DDPStrategy
from rich.console import Console

from deeplens_lightning.activation_data import data_parallel_ranks
from deeplens_lightning.callbacks import FitSummary, LatentStatistics, LossRecovered, Throughput
from deeplens_lightning.callbacks.summary_table import SavedWeights, Summary, summary_table
from deeplens_lightning.callbacks.throughput import peak_rss


def test_the_summary_shows_what_was_measured_and_which_files_were_written(
    fit: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit([LossRecovered(2), LatentStatistics(), Throughput(), FitSummary()], log_every_n_steps=4)
    printed = capsys.readouterr().out
    for word in (
        "tokens",
        "tokens/s",
        "held-out FVU",
        "held-out L0",
        "dead latents",
        "CE recovered",
        "written",
    ):
        assert word in printed
    assert "1,536 in 24 steps" in printed  # 24 batches of 64
    assert "of 128 held-out rows" in " ".join(printed.split())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["tokens"] == 24 * 64
    assert summary["tokens_per_second"] > 0
    assert summary["metrics"]["val/fvu"] == pytest.approx(float(run.trainer.callback_metrics["val/fvu"]))
    assert str(tmp_path / "run") in summary["written"]
    assert str(tmp_path / "run" / "loss_recovered.jsonl") in summary["written"]


def test_curves_hold_every_logged_step(fit: Callable[..., Any], tmp_path: Path) -> None:
    fit([Throughput(), FitSummary()], log_every_n_steps=4)
    lines = [json.loads(line) for line in (tmp_path / "run" / "curves.jsonl").read_text().splitlines()]
    training = [line for line in lines if "train/fvu" in line]
    validation = [line for line in lines if "val/fvu" in line]
    assert [line["step"] for line in training] == [4, 8, 12, 16, 20, 24]
    assert [line["step"] for line in validation] == [12, 24]
    assert all(line["tokens_per_second"] > 0 for line in training)
    assert all(0 <= line["data_wait_fraction"] <= 1 for line in training)


def test_without_validation_the_summary_says_so(
    fit: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    fit([FitSummary()], limit_val_batches=0)
    assert "no validation ran" in capsys.readouterr().out


def test_each_sae_of_a_grid_has_its_own_row() -> None:
    metrics = {"val/fvu/k=8": 0.5, "val/fvu/k=16": 0.25, "val/dead_fraction/k=8": 0.1, "val/rows/k=8": 1000.0}
    summary = Summary(
        tokens=10,
        tokens_per_second=None,
        seconds=0.0,
        steps=1,
        hooks=[],
        metrics=metrics,
        val_rows=2000,
        stopped=None,
        figures=None,
        last=SavedWeights(step=1, file="final.ckpt"),
        best=[],
        written=[],
    )
    console = Console(record=True, width=120, file=None)
    console.print(summary_table(summary))
    text = console.export_text()
    assert "held-out FVU k=8" in text
    assert "0.2500" in text
    assert "none of all 1,000 held-out rows" in text


def test_batches_and_weights_are_bit_identical_with_and_without_them(
    fit: Callable[..., Any], undisturbed: Callable[..., None]
) -> None:
    undisturbed(fit([]), fit([Throughput(), FitSummary()]))


def test_with_accumulated_gradients_curves_have_one_point_for_each_step(
    fit: Callable[..., Any], tmp_path: Path
) -> None:
    fit([FitSummary()], log_every_n_steps=3, accumulate_grad_batches=2)
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "run" / "curves.jsonl").read_text().splitlines()
    ]
    assert steps
    assert set(steps) <= {3, 6, 9, 12}


class _TensorParallel(DDPStrategy):
    """Two processes that train on the same rows."""

    world_size = 2

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        return {"num_replicas": 1, "rank": 0}


def test_rows_are_counted_once_for_processes_that_share_them() -> None:
    assert data_parallel_ranks(SimpleNamespace(strategy=_TensorParallel())) == 1  # type: ignore[arg-type]
    assert data_parallel_ranks(L.Trainer(accelerator="cpu", devices=3, strategy="ddp", logger=False)) == 3
    assert data_parallel_ranks(L.Trainer(accelerator="cpu", devices=1, logger=False)) == 1


def test_peak_memory_is_in_bytes() -> None:
    assert 10_000_000 < peak_rss() < 10**12
