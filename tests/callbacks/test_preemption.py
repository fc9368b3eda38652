"""A signal to one of several ranks ends all of them at the same batch, with a checkpoint that resumes bit for bit."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from deeplens_lightning.callbacks import Preemption
from deeplens_lightning.cli.main import lightning_cli
from deeplens_lightning.sae import SparseAutoencoder, SparseAutoencoderGrid
from tests.support.ranks import launch
from tests.support.recorder import Recorder
from tests.support.training import data, sae, trainer

STEPS = 12
AT_ONCE = 60  # seconds; clusters kill a job 30 to 120 seconds after the signal


class Mean(L.LightningModule):
    """A minimal module, which learns the mean row."""

    def __init__(self, d_in: int) -> None:
        super().__init__()
        self.mean = torch.nn.Parameter(torch.zeros(d_in))


class _Term(L.Callback):
    """Rank 0 sends SIGTERM to rank 1 at a batch, whatever rank 1 does at that moment."""

    def __init__(self, batch: int, folder: Path) -> None:
        self.batch, self.folder = batch, folder
        self.sent = 0.0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        (self.folder / f"pid-{trainer.global_rank}").write_text(str(os.getpid()))
        trainer.strategy.barrier()

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.batch and trainer.global_rank == 0:
            self.sent = time.monotonic()
            os.kill(int((self.folder / "pid-1").read_text()), signal.SIGTERM)


def _fit(rank: int, ranks: int, folder: Path, lm: str, term_at: int | None, ckpt_path: str | None) -> Any:
    dm, recorder = data(lm), Recorder()
    term = _Term(STEPS if term_at is None else term_at, folder)
    keep = ModelCheckpoint(folder / "kept", every_n_train_steps=1000)  # checkpoints are on
    run = trainer(
        folder,
        recorder,
        [term, keep],
        strategy="ddp",
        devices=ranks,
        max_steps=STEPS,
        limit_val_batches=0,
    )
    module, before, stopped = sae(dm), signal.getsignal(signal.SIGTERM), False
    try:
        run.fit(module, dm, ckpt_path=ckpt_path)
    except SIGTERMException:
        stopped = True
    return {
        "stopped": stopped,
        "seconds": time.monotonic() - term.sent if term.sent else 0.0,
        "step": run.global_step,
        "rows": [rows.numpy() for _, rows in recorder.batches],
        "weights": {name: value.numpy() for name, value in module.state_dict().items()},
        "restored": signal.getsignal(signal.SIGTERM) is before,
        "present": sum(isinstance(callback, Preemption) for callback in run.callbacks),
    }


def _same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    return all((found[name] == expected[name]).all() for name in expected)


def test_a_signal_to_rank_1_stops_both_ranks_and_both_resume_bit_for_bit(tiny: Any, tmp_path: Path) -> None:
    lm = tiny("gpt2")
    whole = launch(2, _fit, tmp_path, lm, None, None)
    first = launch(2, _fit, tmp_path, lm, 5, None, seconds=60)
    assert [one["stopped"] for one in first] == [True, True]
    assert first[0]["step"] == first[1]["step"] in range(6, 9), (
        "the ranks stopped at different steps, or late"
    )
    assert first[0]["seconds"] < AT_ONCE
    second = launch(2, _fit, tmp_path, lm, None, str(tmp_path / Preemption.FILE))
    for before, after, one in zip(first, second, whole, strict=True):
        assert before["restored"]
        assert before["present"] == after["present"] == 1  # SAEs add it
        rows = [*before["rows"], *after["rows"]]
        assert len(rows) == len(one["rows"]) == STEPS
        assert all((a == b).all() for a, b in zip(rows, one["rows"], strict=True))
        assert _same(after["weights"], one["weights"])


def test_a_signal_in_the_last_batch_is_not_lost(tiny: Any, tmp_path: Path) -> None:
    ended = launch(2, _fit, tmp_path, tiny("gpt2"), STEPS - 1, None, seconds=60)
    assert [one["stopped"] for one in ended] == [True, True]
    assert [one["step"] for one in ended] == [STEPS, STEPS]
    assert torch.load(tmp_path / Preemption.FILE, weights_only=True)["global_step"] == STEPS


def _present(
    module: L.LightningModule, folder: Path, *callbacks: L.Callback, **options: Any
) -> list[Preemption]:
    """The `Preemption`s of a Trainer whose fit was refused before its first step."""
    options = {"devices": 2, "strategy": "ddp_fork", "enable_checkpointing": True} | options
    run = L.Trainer(
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    run.strategy.connect(module)
    module.trainer = run
    run.state.fn = L.pytorch.trainer.states.TrainerFn.FITTING
    run._callback_connector._attach_model_callbacks()
    return [callback for callback in run.callbacks if isinstance(callback, Preemption)]


@pytest.mark.parametrize("kind", ["one", "grid"])
def test_saes_add_preemption_on_several_ranks_only(kind: str, tmp_path: Path) -> None:
    one, grid = SparseAutoencoder(8, 16, k=2), SparseAutoencoderGrid(8, {"k": [2, 4]}, {"d_sae": 16})
    module = one if kind == "one" else grid
    own = Preemption(tmp_path / "mine")
    assert len(_present(module, tmp_path)) == 1
    assert _present(module, tmp_path, own) == [own]
    assert _present(module, tmp_path, devices=1, strategy="auto") == []
    assert _present(module, tmp_path, enable_checkpointing=False) == []


def test_the_command_line_adds_it_for_a_module_of_any_class(tmp_path: Path) -> None:
    words = [
        "--model=tests.callbacks.test_preemption.Mean",
        "--data.hook=mlp_out",
        "--data.layer=0",
        "--trainer.accelerator=cpu",
        f"--trainer.default_root_dir={tmp_path}",
    ]
    for devices in (1, 2):
        cli = lightning_cli([*words, f"--trainer.devices={devices}", "--trainer.strategy=ddp"], run=False)
        cli.before_fit()  # type: ignore[attr-defined]
        cli.before_fit()  # type: ignore[attr-defined]
        assert sum(isinstance(callback, Preemption) for callback in cli.trainer.callbacks) == 1


def test_a_fit_in_a_thread_says_that_signals_are_not_seen(tiny: Any, tmp_path: Path) -> None:
    warned: list[str] = []

    def work() -> None:
        dm = data(tiny("gpt2"))
        run = trainer(tmp_path, None, [Preemption()], max_steps=2, limit_val_batches=0)
        with pytest.warns(UserWarning, match="Preemption does not see signals, because fit runs in a thread"):
            run.fit(sae(dm), dm)
        warned.append("yes")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert warned
