"""`--ckpt_path newest:FOLDER`: a job that is started again continues from its newest checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from deeplens_lightning.cli.main import main

ROOT = Path(__file__).parents[2]


def test_a_job_started_again_goes_on(tiny: Any, tmp_path: Path) -> None:
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
