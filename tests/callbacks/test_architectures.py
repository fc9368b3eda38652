"""All callbacks together with every kind of SAE, hook point, normalisation and precision."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from deeplens_lightning import SparseAutoencoder, SparseAutoencoderGrid
from deeplens_lightning.callbacks import (
    ExtractSingleSample,
    FitSummary,
    LatentStatistics,
    LossRecovered,
    Throughput,
    TopActivatingTokens,
)
from deeplens_lightning.reporting.report import write_report

TEXT = "The capital of France is Paris."


def everything() -> list[L.Callback]:
    return [
        ExtractSingleSample(texts=[TEXT], every_n_steps=4),
        LossRecovered(100),
        LatentStatistics(every_n_steps=3),
        TopActivatingTokens(latents=16, keep=3, every_n_steps=2),
        Throughput(),
        FitSummary(),
    ]


def _transcoder(d_in: Any) -> L.LightningModule:
    return SparseAutoencoder(
        d_in, d_sae=128, k=8, input_hook="layers.1.mlp_in", output_hook="layers.1.mlp_out", skip=True
    )


CASES: dict[str, tuple[dict[str, Any], Callable[[Any], L.LightningModule], dict[str, Any]]] = {
    "transcoder": ({"hook": ["mlp_in", "mlp_out"]}, _transcoder, {}),
    "crosscoder": (
        {"layer": [0, 1], "hook": "resid_post"},
        lambda d: SparseAutoencoder(d, d_sae=128, k=8),
        {},
    ),
    "one_of_two_hooks": (
        {"hook": ["mlp_act", "mlp_out"]},
        lambda d: SparseAutoencoder(d, d_sae=128, k=8, input_hook="layers.1.mlp_out"),
        {},
    ),
    "grid": ({}, lambda d: SparseAutoencoderGrid(d, {"k": [4, 8]}, {"d_sae": 128}), {}),
    "normalised": ({"normalize": "zscore"}, lambda d: SparseAutoencoder(d, d_sae=128, k=8), {}),
    "jumprelu": ({}, lambda d: SparseAutoencoder(d, d_sae=128, architecture="jumprelu"), {}),
    "bf16-true": ({}, lambda d: SparseAutoencoder(d, d_sae=128, k=8), {"precision": "bf16-true"}),
    "bf16-mixed": ({}, lambda d: SparseAutoencoder(d, d_sae=128, k=8), {"precision": "bf16-mixed"}),
}


@pytest.mark.parametrize("case", CASES)
def test_all_callbacks_run_and_change_nothing(
    case: str,
    fit: Callable[..., Any],
    live: Callable[..., Any],
    undisturbed: Callable[..., None],
    tmp_path: Path,
) -> None:
    data, make, options = CASES[case]
    options = {"max_epochs": 1, "log_every_n_steps": 4} | options

    def trained(callbacks: list[L.Callback]) -> Any:
        datamodule = live(**data)
        return fit(callbacks, datamodule=datamodule, sae=make(datamodule.d_in), **options)

    watched = trained(everything())
    folder = tmp_path / "run"
    lines = [
        json.loads(line) for line in (folder / "single_samples" / "samples.jsonl").read_text().splitlines()
    ]
    assert {line["step"] for line in lines} == {4, 8, 12}
    assert all(math.isfinite(line["relative_error"]) and line["norm"] > 0 for line in lines)
    recovered = float(watched.trainer.callback_metrics["val/ce_recovered"])
    assert math.isfinite(recovered)
    contexts = json.loads((folder / "top_tokens" / "latents.json").read_text())["latents"]
    assert any(entry["contexts"] for entry in contexts)
    assert json.loads((folder / "latent_statistics" / "latest.json").read_text())["heldout"]["rows"] == 128
    assert write_report(folder).stat().st_size > 10_000
    undisturbed(trained([]), watched)


def test_the_error_of_a_transcoder_is_measured_on_its_output(
    fit: Callable[..., Any], live: Callable[..., Any], tmp_path: Path
) -> None:
    data, make, _ = CASES["transcoder"]
    datamodule = live(**data)
    sample = ExtractSingleSample(texts=[TEXT])
    run = fit([sample], datamodule=datamodule, sae=make(datamodule.d_in))
    alone = ExtractSingleSample(datamodule.hf_model, layer=1)
    given, wanted = (alone.get_mlp_acts(TEXT, hook=hook) for hook in ("mlp_in", "mlp_out"))
    with torch.no_grad():
        error = (run.sae.eval()(given) - wanted).norm(dim=1)
    lines = [
        json.loads(line)
        for line in (tmp_path / "run" / "single_samples" / "samples.jsonl").read_text().splitlines()
    ]
    last = [line for line in lines if line["step"] == lines[-1]["step"]]
    assert [line["error"] for line in last] == pytest.approx(error.tolist(), rel=1e-3)
    assert [line["norm"] for line in last] == pytest.approx(wanted.norm(dim=1).tolist(), rel=1e-4)


def test_one_sae_of_a_grid_is_chosen_by_name(
    fit: Callable[..., Any], live: Callable[..., Any], tmp_path: Path
) -> None:
    data, make, _ = CASES["grid"]
    datamodule = live(**data)
    fit([ExtractSingleSample(texts=[TEXT], sae="k=8")], datamodule=datamodule, sae=make(datamodule.d_in))
    lines = [
        json.loads(line)
        for line in (tmp_path / "run" / "single_samples-k=8" / "samples.jsonl").read_text().splitlines()
    ]
    assert max(line["l0"] for line in lines) == 8
    with pytest.raises(ValueError, match=r"sae='k=9' is not in training; there are 'k=4', 'k=8'"):
        fit([LatentStatistics(sae="k=9")], datamodule=live(**data), sae=make(128))
