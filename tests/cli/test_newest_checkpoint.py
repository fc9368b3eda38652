"""`--ckpt_path`: a job that is started again continues from its newest checkpoint, or says why not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from deeplens_lightning.cli.main import main
from deeplens_lightning.cli.newest_checkpoint import checkpoint_path, newest_checkpoint

ROOT = Path(__file__).parents[2]


def test_a_job_that_is_started_again_continues_its_steps(tiny: Any, tmp_path: Path) -> None:
    def start(steps: int) -> None:
        changes = {
            "trainer.default_root_dir": tmp_path / "run",
            "trainer.logger": "false",
            "trainer.enable_progress_bar": "false",
            "trainer.accelerator": "cpu",
            "trainer.max_epochs": "-1",
            "trainer.max_steps": steps,
            "trainer.limit_val_batches": 1,
            "trainer.log_every_n_steps": 1,
            "data.hf_model": tiny("gpt2"),
            "data.layer": 1,
            "data.dataset_name": str(ROOT / "README.md"),
            "data.seq_length": 32,
            "data.batch_size": 16,
            "data.buffer_size": 96,
            "data.max_tokens": 96,
            "data.val_fraction": 0,
            "ckpt_path": f"newest:{tmp_path / 'run'}",
        }
        words = [word for name, value in changes.items() for word in (f"--{name}", str(value))]
        for name in ("cluster/preemptible", "quickstart"):
            words[:0] = ["--config", str(ROOT / "configs" / f"{name}.yaml")]
        main(["--traceback", "fit", *words])

    start(6)
    (first,) = (tmp_path / "run" / "checkpoints").glob("*.ckpt")
    assert torch.load(first, weights_only=True)["global_step"] == 6
    start(12)
    steps = {
        torch.load(path, weights_only=True)["global_step"]
        for path in (tmp_path / "run" / "checkpoints").glob("*.ckpt")
    }
    assert max(steps) == 12


def checkpoint(path: Path, age: int, **entries: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    full = {"loops": {}, "state_dict": {"w": torch.randn(5000)}, "optimizer_states": []}
    torch.save(full | entries, path)
    os.utime(path, ns=(10**18 - age, 10**18 - age))
    return path


def test_the_newest_checkpoint_that_loads_is_found_and_damaged_ones_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert newest_checkpoint(tmp_path / "nowhere") is None
    old = checkpoint(tmp_path / "version_0" / "step=3.ckpt", 30)
    new = checkpoint(tmp_path / "version_1" / "step=6.ckpt", 20)
    assert newest_checkpoint(tmp_path) == new
    cut = checkpoint(tmp_path / "last.ckpt", 10)
    cut.write_bytes(cut.read_bytes()[:9000])
    (tmp_path / "empty.ckpt").touch()
    (tmp_path / "words.ckpt").write_text("no checkpoint")
    torch.save({"a": 1}, tmp_path / "weights alone.ckpt")
    with caplog.at_level("INFO"):
        assert newest_checkpoint(tmp_path) == new
    assert f"{cut} is passed over: it is damaged" in caplog.messages
    assert f"{tmp_path / 'empty.ckpt'} is passed over: it is damaged" in caplog.messages
    flipped = bytearray(new.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    new.write_bytes(bytes(flipped))
    assert newest_checkpoint(tmp_path) == old
    shutil.rmtree(old.parent)
    assert newest_checkpoint(tmp_path) is None


def test_a_fit_passes_over_weights_without_an_optimizer_and_other_commands_load_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = checkpoint(tmp_path / "full.ckpt", 20)
    new = checkpoint(tmp_path / "weights.ckpt", 10)
    torch.save({"loops": {}, "state_dict": {}}, new)
    given = f"newest:{tmp_path}"
    assert checkpoint_path(given, "validate", "runs") == str(new)
    with caplog.at_level("INFO"):
        assert checkpoint_path(given, "fit", "runs") == str(old)
    assert caplog.messages == [f"{new} is passed over: it has no optimizer_states"]


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = checkpoint(tmp_path / "runs" / "a.ckpt", 0)
    assert checkpoint_path("newest:~/runs", "fit", "runs") == str(path)


def quickstart(command: str, small: list[str], *words: str) -> None:
    main(
        [
            command,
            "--config",
            str(ROOT / "configs" / "quickstart.yaml"),
            *small,
            "--trainer.max_steps=2",
            *words,
        ]
    )


def versions(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("version_*")}


@pytest.mark.parametrize(
    ("command", "word", "source"),
    [
        ("fit", "last", "the command line"),
        ("fit", "last", "a config"),
        ("validate", "best", "the command line"),
    ],
)
def test_words_for_the_run_that_starts_now_are_refused_before_it_has_a_folder(
    command: str, word: str, source: str, small: list[str], tmp_path: Path
) -> None:
    if source == "a config":
        (tmp_path / "more.yaml").write_text(f"ckpt_path: {word}\n")
        words = ["--config", str(tmp_path / "more.yaml")]
    else:
        words = ["--ckpt_path", word]
    runs = tmp_path / "runs"
    with pytest.raises(SystemExit) as exit_:
        quickstart(command, small, *words)
    assert exit_.value.code == (
        f"error: --ckpt_path {word}: Lightning would look only in the folder of the run that starts now; give the path "
        f"of a checkpoint, or newest:{runs} for the newest intact one below {runs}"
    )
    assert not versions(tmp_path)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("/no/such/last.ckpt", "there is no such file"),
        ("newest:", "give a local folder"),
        ("newest:s3://bucket/runs", "give a local folder"),
    ],
)
def test_what_cannot_be_continued_from_is_one_sentence_before_anything_is_loaded(
    given: str, words: str, small: list[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as exit_:
        quickstart("fit", small, "--data.hf_model=/nowhere", "--ckpt_path", given)
    said = str(exit_.value.code)
    assert words in said
    assert f"newest:{tmp_path / 'runs'}" in said
    assert given in said


@pytest.mark.parametrize("command", ["validate", "predict"])
def test_a_command_that_needs_weights_refuses_a_folder_without_a_checkpoint(
    command: str, small: list[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as exit_:
        quickstart(command, small, "--ckpt_path", f"newest:{tmp_path / 'nowhere'}")
    where = tmp_path / "nowhere"
    assert exit_.value.code == (
        f"error: --ckpt_path newest:{where}: there is no intact checkpoint below {where}, and {command} needs one"
    )


def test_newest_in_a_config_says_that_it_starts_from_the_beginning_and_then_continues(
    small: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runs = tmp_path / "runs"
    (tmp_path / "again.yaml").write_text(f"ckpt_path: newest:{runs}\n")
    words = [
        "--config",
        str(tmp_path / "again.yaml"),
        "--trainer.limit_val_batches=0",
        "--trainer.max_epochs=-1",
    ]
    before = sys.argv
    with caplog.at_level("INFO"):
        quickstart("fit", small, *words)
    said = f"--ckpt_path newest:{runs}: no checkpoint to continue from, so training starts from the beginning"
    assert said in caplog.messages
    last = newest_checkpoint(runs)
    caplog.clear()
    with caplog.at_level("INFO"):
        quickstart("fit", small, *words, "--trainer.max_steps=4")
    assert f"Restored all states from the checkpoint at {last}" in caplog.messages
    assert said not in caplog.messages
    assert max(torch.load(path, weights_only=True)["global_step"] for path in runs.rglob("*.ckpt")) == 4
    assert sys.argv is before


@pytest.mark.slow
def test_two_ranks_start_and_continue_with_the_same_command(small: list[str], tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    words = [
        sys.executable,
        "-m",
        "deeplens_lightning",
        "fit",
        *small,
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
    ]
    words = [word for word in words if "logger" not in word]
    for steps in (2, 4):
        done = subprocess.run(
            [*words, f"--trainer.max_steps={steps}", "--ckpt_path", f"newest:{runs}"],
            cwd=ROOT, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("no checkpoint to continue from") == (steps == 2)
        assert (
            max(torch.load(path, weights_only=True)["global_step"] for path in runs.rglob("*.ckpt")) == steps
        )


def test_a_resumed_run_says_in_one_line_that_the_best_files_are_ranked_anew(
    small: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "best.yaml").write_text(
        "trainer: {callbacks: [{class_path: ModelCheckpoint, init_args: {monitor: val/fvu, filename: best}}]}\n"
    )
    for epochs in (1, 2):
        words = [
            "--config",
            str(tmp_path / "best.yaml"),
            "--trainer.max_steps=-1",
            f"--trainer.max_epochs={epochs}",
        ]
        with caplog.at_level("INFO"):
            quickstart("fit", small, *words, "--ckpt_path", f"newest:{tmp_path / 'runs'}")
    versions = tmp_path / "runs" / "lightning_logs"
    first, second = (versions / f"version_{number}" / "checkpoints" for number in (0, 1))
    said = f"checkpoints are ranked by val/fvu anew in {second}; the best before is {first / 'best.ckpt'}"
    assert said in caplog.messages
    assert (second / "best.ckpt").exists()
