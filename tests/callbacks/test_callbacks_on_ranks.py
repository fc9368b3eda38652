"""On two ranks the callbacks write one set of files and logs, and no rank hangs."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger

from deeplens_lightning import SparseAutoencoder
from deeplens_lightning.callbacks import (
    ExtractSingleSample,
    FitSummary,
    LatentStatistics,
    LossRecovered,
    Throughput,
    TopActivatingTokens,
)
from tests.support.ranks import launch
from tests.support.training import data, trainer


def fit(rank: int, ranks: int, model: str, texts: list[str], folder: Path) -> str:
    """Train with every callback on this rank; return what it printed."""
    datamodule = data(
        model,
        texts,
        seq_length=64,
        batch_size=32,
        buffer_size=128,
        max_tokens=ranks * 10 * 32,
        val_rows=400,
        normalize="standardize",
    )
    callbacks = [
        ExtractSingleSample(texts=["The cat sat on the mat."], every_n_steps=5),
        LossRecovered(100),
        LatentStatistics(every_n_steps=3),
        TopActivatingTokens(latents=16, every_n_steps=2),
        Throughput(),
        FitSummary(),
    ]
    run = trainer(
        folder,
        callbacks=callbacks,
        max_epochs=2,
        strategy="ddp",
        devices=ranks,
        logger=CSVLogger(folder),
        log_every_n_steps=5,
    )
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run.fit(SparseAutoencoder(d_in=datamodule.d_in, d_sae=256, k=8), datamodule)
    return printed.getvalue()


def fail(rank: int, ranks: int, model: str, texts: list[str], folder: Path) -> str:
    """Measure the loss on a text without a second token, which is an error on rank 0; return the error of this rank."""
    datamodule = data(model, texts, max_tokens=ranks * 4 * 16)
    run = trainer(
        folder,
        callbacks=[LossRecovered(texts=["a"])],
        max_epochs=1,
        limit_val_batches=1,
        strategy="ddp",
        devices=ranks,
    )
    try:
        run.fit(SparseAutoencoder(d_in=datamodule.d_in, d_sae=64, k=8), datamodule)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_an_error_on_rank_0_ends_the_other_ranks_too(
    lm_folder: str, texts: list[str], tmp_path: Path
) -> None:
    own, other = launch(2, fail, lm_folder, texts, tmp_path, seconds=60)
    assert own.startswith("ValueError: LossRecovered found no held-out token to score")
    assert other == f"RuntimeError: rank 0 failed with {own}"


def test_two_ranks_write_one_set_of_files_and_end_together(
    lm_folder: str, texts: list[str], tmp_path: Path
) -> None:
    printed = "".join(launch(2, fit, lm_folder, texts, tmp_path))
    (run,) = (tmp_path / "lightning_logs").iterdir()
    assert printed.count("held-out FVU") == 1
    lines = [json.loads(line) for line in (run / "single_samples" / "samples.jsonl").read_text().splitlines()]
    places = [(line["step"], line["position"]) for line in lines]
    assert len(set(places)) == len(places)  # only one rank writes
    assert {step for step, _ in places} == {5, 10, 15, 20}
    assert [json.loads(x)["step"] for x in (run / "loss_recovered.jsonl").read_text().splitlines()] == [
        10,
        20,
    ]
    latest = json.loads((run / "latent_statistics" / "latest.json").read_text())
    assert latest["heldout"]["rows"] == 400  # of both ranks together
    assert latest["training"]["rows"] == 3 * 2 * 32  # steps 12, 15, 18
    summary = json.loads((run / "summary.json").read_text())
    assert summary["tokens"] == 2 * 2 * 10 * 32
    assert summary["metrics"]["val/ce_recovered"] is not None
    assert json.loads((run / "top_tokens" / "latents.json").read_text())["rows"] == 10 * 32
