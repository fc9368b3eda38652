"""`--ckpt_path newest:FOLDER`: a job that is started again continues from its newest checkpoint."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from deeplens_lightning.cli.main import main
from deeplens_lightning.cli.newest_checkpoint import newest_checkpoint, with_newest

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


def checkpoint(path: Path, age: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"loops": {}, "state_dict": {"w": torch.randn(5000)}}, path)
    os.utime(path, ns=(10**18 - age, 10**18 - age))
    return path


def test_the_newest_checkpoint_that_loads_is_found_and_damaged_ones_are_passed_over(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "nowhere") is None
    old = checkpoint(tmp_path / "version_0" / "step=3.ckpt", 30)
    new = checkpoint(tmp_path / "version_1" / "step=6.ckpt", 20)
    assert newest_checkpoint(tmp_path) == new
    cut = checkpoint(tmp_path / "last.ckpt", 10)
    cut.write_bytes(cut.read_bytes()[:9000])
    (tmp_path / "empty.ckpt").touch()
    (tmp_path / "words.ckpt").write_text("no checkpoint")
    torch.save({"a": 1}, tmp_path / "weights alone.ckpt")
    assert newest_checkpoint(tmp_path) == new
    flipped = bytearray(new.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    new.write_bytes(bytes(flipped))
    assert newest_checkpoint(tmp_path) == old
    shutil.rmtree(old.parent)
    assert newest_checkpoint(tmp_path) is None


def test_newest_in_the_arguments_becomes_the_path_of_the_checkpoint_or_nothing(tmp_path: Path) -> None:
    words = ["fit", "--ckpt_path", f"newest:{tmp_path}", "--seed", "1"]
    assert with_newest(words) == ["fit", "--seed", "1"], "the option stays although there is no checkpoint"
    path = checkpoint(tmp_path / "a.ckpt", 0)
    assert with_newest(words) == ["fit", f"--ckpt_path={path}", "--seed", "1"]
    assert with_newest(["fit", f"--ckpt_path=newest:{tmp_path}"]) == ["fit", f"--ckpt_path={path}"]
    assert with_newest(["fit", "--ckpt_path", "other.ckpt"]) == ["fit", "--ckpt_path", "other.ckpt"]
