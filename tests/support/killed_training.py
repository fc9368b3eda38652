"""A training that test_kill.py kills and starts again: `python -m tests.support.killed_training FOLDER MODEL`.

It continues from the newest checkpoint of the folder, and trains to the end.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from deeplens_lightning.cli.newest_checkpoint import newest_checkpoint
from tests.support.texts import texts
from tests.support.training import data, sae, trainer

STEPS = 90
STOP_AFTER = "TEST_STOP_AFTER_LINES"
"""Environment variable: the number of lines after which `Metrics` blocks, so that a kill comes before the end."""


class Metrics(L.Callback):
    """Append a line of metrics for each step and each validation."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.lines = 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, i: int
    ) -> None:
        line = {"batch": float(batch.double().sum()), "loss": float(outputs["loss"])}
        self._write(trainer.global_step, line | self._logged(trainer, "train/"))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(-trainer.global_step, self._logged(trainer, "val/"))

    def _logged(self, trainer: L.Trainer, prefix: str) -> dict[str, float]:
        """Metrics of this stage: those of the other one are older, and a checkpoint does not restore them."""
        metrics = trainer.callback_metrics.items()
        return {name: float(value) for name, value in metrics if name.startswith(prefix)}

    def _write(self, step: int, values: dict[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        self.lines += 1
        if self.lines == int(os.environ.get(STOP_AFTER, 0)):
            time.sleep(3600)
        time.sleep(0.01)  # so that a kill can come at any place, also while a checkpoint is written


def main(folder: Path, model: str) -> None:
    torch.set_num_threads(1)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dm = data(model, texts(60), normalize="zscore")
    checkpoints = ModelCheckpoint(folder / "kept", every_n_train_steps=3, save_last=True, filename="{step}")
    run = trainer(
        folder,
        callbacks=[Metrics(folder / f"metrics-{rank}.jsonl"), checkpoints],
        max_steps=STEPS,
        val_check_interval=25,
        check_val_every_n_epoch=None,
        limit_val_batches=2,
        log_every_n_steps=1,
        strategy="ddp",
        devices=ranks,
    )
    module = sae(dm)
    run.fit(module, dm, ckpt_path=newest_checkpoint(folder))
    final = {"weights": module.state_dict(), "optimizer": run.optimizers[0].state_dict()}
    torch.save(final, folder / f"final-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
