"""Several callbacks of a kind measure the SAEs of a grid side by side, with files and metrics of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deeplens_lightning import SparseAutoencoder, SparseAutoencoderGrid
from deeplens_lightning.callbacks import (
    ExtractSingleSample,
    FitSummary,
    LatentStatistics,
    LossRecovered,
    TopActivatingTokens,
)
from deeplens_lightning.reporting.report import write_report
from deeplens_lightning.reporting.run_data import find_run, read_run

TEXT = "The cat sat."
NAMES = ("k=4", "k=8")


def test_each_observer_of_a_grid_has_files_and_metrics_of_its_own(
    fit: Callable[..., Any], live: Callable[..., Any], tmp_path: Path
) -> None:
    dm = live()
    observers = [
        kind
        for name in NAMES
        for kind in (
            LatentStatistics(sae=name),
            LossRecovered(100, sae=name),
            TopActivatingTokens(latents=8, every_n_steps=2, sae=name),
            ExtractSingleSample(texts=[TEXT], sae=name),
        )
    ]
    grid = SparseAutoencoderGrid(dm.d_in, {"k": [4, 8]}, {"d_sae": 128})
    run = fit([*observers, FitSummary()], datamodule=dm, sae=grid, max_epochs=1)
    folder = tmp_path / "run"
    dm.setup("fit")
    rows = torch.cat(list(dm.val_dataloader()))
    ce = []
    for name in NAMES:
        with torch.no_grad():
            fired = (grid.eval()[name].encode(rows) > 0).sum(0)
        latest = json.loads((folder / f"latent_statistics-{name}" / "latest.json").read_text())
        assert latest["sae"] == name
        assert latest["heldout"]["counts"] == fired.tolist()
        metrics = run.trainer.callback_metrics
        assert float(metrics[f"latents/dead_fraction/{name}"]) == pytest.approx(
            float((fired == 0).float().mean())
        )
        ce.append(float(metrics[f"val/ce_sae/{name}"]))
        [line] = (folder / f"loss_recovered-{name}.jsonl").read_text().splitlines()
        assert json.loads(line)["ce_sae"] == pytest.approx(ce[-1], rel=1e-6)
        assert json.loads((folder / f"top_tokens-{name}" / "latents.json").read_text())["sae"] == name
        lines = (folder / f"single_samples-{name}" / "samples.jsonl").read_text().splitlines()
        assert {json.loads(line)["sae"] for line in lines} == {name}
        assert max(json.loads(line)["l0"] for line in lines) == int(name[2:])
    assert ce[0] != ce[1]
    core = json.loads((folder / "summary.json").read_text())["saebench"]
    assert [core[name]["model_performance_preservation"]["ce_loss_with_sae"] for name in NAMES] == ce
    found = read_run(find_run(tmp_path))
    assert [each["sae"] for each in found.firing] == list(NAMES)
    assert {each["sae"] for each in found.latents} == set(NAMES)
    assert {each["sae"] for each in found.samples} == set(NAMES)
    assert write_report(tmp_path).parent == folder


def test_two_observers_with_one_place_are_refused(fit: Callable[..., Any], live: Callable[..., Any]) -> None:
    dm = live()
    grid = SparseAutoencoderGrid(dm.d_in, {"k": [4, 8]}, {"d_sae": 128})
    both = [LatentStatistics(sae="k=4"), LatentStatistics(sae="k=4", max_rows=64)]
    match = (
        r"LatentStatistics and LatentStatistics would both write to latent_statistics-k=4 in the run's folder: give each "
        r"the name of another SAE as sae="
    )
    with pytest.raises(ValueError, match=match):
        fit(both, datamodule=dm, sae=grid)


def test_the_name_of_an_sae_is_refused_where_there_is_one_sae(fit: Callable[..., Any]) -> None:
    with pytest.raises(
        ValueError, match=r"sae='k=4' names an SAE of a grid, and SparseAutoencoder has one without"
    ):
        fit([TopActivatingTokens(sae="k=4")])


def test_texts_of_a_second_callback_have_metrics_of_their_own(
    fit: Callable[..., Any], tmp_path: Path
) -> None:
    from lightning.pytorch.loggers import CSVLogger

    first, second = (
        ExtractSingleSample(texts=[TEXT, TEXT]),
        ExtractSingleSample(texts=["Paris."], name="other"),
    )
    fit([first, second], logger=CSVLogger(tmp_path, version="x"), sae=SparseAutoencoder(128, d_sae=64, k=4))
    names = (tmp_path / "lightning_logs" / "x" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {name for name in names if name.endswith("/norm")} == {f"single_sample/{i}/norm" for i in range(3)}
    assert (tmp_path / "lightning_logs" / "x" / "other" / "samples.jsonl").is_file()
