"""What a summary counts, what a report shows and which rows a latent keeps go on after a resume into another folder."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console

from deeplens_lightning.callbacks import ExtractSingleSample, FitSummary, TopActivatingTokens, summary
from deeplens_lightning.callbacks.summary_table import Summary, summary_table
from deeplens_lightning.reporting.run_data import read_run
from deeplens_lightning.reporting.run_folder import RESUMED
from tests.support.training import data, sae, trainer

# Lightning: a run that is continued in another folder
pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")

BATCH, STEPS, SAVED = 16, 12, 6
IN_STEPS: dict[str, Any] = {"val_check_interval": 4, "check_val_every_n_epoch": None}


class Clock(L.Callback):
    """A clock that shows 1 second for each training batch, and 100 for each validation batch."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds

    def on_train_batch_start(self, *_: Any) -> None:
        self.seconds += 1

    def on_validation_batch_start(self, *_: Any) -> None:
        self.seconds += 100


def fit(folder: Path, lm: str, *callbacks: L.Callback, ckpt_path: Any = None) -> dict[str, Any]:
    """Fit with a summary, saving after half of the steps; return the summary."""
    dm = data(lm)
    keep = ModelCheckpoint(folder / "kept", filename="{step}", every_n_train_steps=SAVED, save_top_k=-1)
    run = trainer(
        folder,
        None,
        [*callbacks, FitSummary(), keep],
        max_steps=STEPS,
        log_every_n_steps=1,
        enable_checkpointing=True,
        **IN_STEPS,
    )
    run.fit(sae(dm), dm, ckpt_path=ckpt_path)
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(summary, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    return clock


def test_seconds_go_on_after_each_validation_and_leave_it_out(
    tiny: Any, tmp_path: Path, clock: Clock
) -> None:
    found = fit(tmp_path, tiny("gpt2"), clock)
    assert (found["steps"], found["tokens"]) == (STEPS, STEPS * BATCH)
    assert found["seconds"] == STEPS
    assert found["tokens_per_second"] == BATCH


def test_tokens_and_seconds_go_on_after_a_resume(tiny: Any, tmp_path: Path, clock: Clock) -> None:
    fit(tmp_path / "a", tiny("gpt2"), clock)
    found = fit(tmp_path / "b", tiny("gpt2"), clock, ckpt_path=tmp_path / "a" / "kept" / f"step={SAVED}.ckpt")
    assert (found["steps"], found["tokens"], found["since_step"]) == (STEPS, STEPS * BATCH, 0)
    assert found["seconds"] == STEPS
    assert json.loads((tmp_path / "b" / RESUMED).read_text()) == {"from": "../a", "step": SAVED}


def test_a_checkpoint_without_counts_is_said_to_have_none(tiny: Any, tmp_path: Path) -> None:
    fit(tmp_path / "a", tiny("gpt2"))
    path = tmp_path / "a" / "kept" / f"step={SAVED}.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["fit_summary"]  # as in one of an earlier release
    torch.save(checkpoint, path)
    found = fit(tmp_path / "b", tiny("gpt2"), ckpt_path=path)
    assert (found["steps"], found["since_step"]) == (STEPS, SAVED)
    assert found["tokens"] == (STEPS - SAVED) * BATCH
    assert not (tmp_path / "b" / RESUMED).exists()
    console = Console(record=True, width=200, file=None)
    fields = found | {"figures": None, "last": "", "best": [], "written": []}
    console.print(summary_table(Summary(**{name: fields[name] for name in Summary.__dataclass_fields__})))
    text = console.export_text()
    assert (
        f"{(STEPS - SAVED) * BATCH} in {STEPS - SAVED} steps since step {SAVED}; the checkpoint does not"
        in text
    )


def test_a_resumed_run_is_reported_from_its_first_step(tiny: Any, tmp_path: Path) -> None:
    sample = ExtractSingleSample(texts=["The cat sat."], every_n_steps=3)
    fit(tmp_path / "a", tiny("gpt2"), sample)
    sample = ExtractSingleSample(texts=["The cat sat."], every_n_steps=3)
    fit(tmp_path / "b", tiny("gpt2"), sample, ckpt_path=tmp_path / "a" / "kept" / f"step={SAVED}.ckpt")
    run = read_run(tmp_path / "b")
    assert run.earlier == [str(tmp_path / "a")]
    assert [step for step, _ in run.curves["train/fvu"]] == list(range(1, STEPS + 1))
    assert [step for step, _ in run.curves["val/fvu"]] == [4, 8, 12]
    (shown,) = run.samples
    assert [look["step"] for look in shown["looks"]] == [3, 4, 6, 8, 9, 12]


def test_the_kept_rows_of_latents_go_on_after_a_resume(
    tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def top(keep: int = 4) -> TopActivatingTokens:
        return TopActivatingTokens(latents=16, keep=keep, every_n_steps=2)

    fit(tmp_path / "a", tiny("gpt2"), top())
    path = tmp_path / "a" / "kept" / f"step={SAVED}.ckpt"
    fit(tmp_path / "b", tiny("gpt2"), top(), ckpt_path=path)
    whole, resumed = ((tmp_path / name / "top_tokens" / "latents.json").read_text() for name in "ab")
    assert json.loads(resumed)["rows"] == STEPS // 2 * BATCH
    assert resumed == whole
    with caplog.at_level("INFO"):
        fit(tmp_path / "c", tiny("gpt2"), top(keep=2), ckpt_path=path)
    assert any(f"TopActivatingTokens starts anew at step {SAVED}" in message for message in caplog.messages)
