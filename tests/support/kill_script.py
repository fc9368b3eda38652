"""Run by test_kill on each rank: trains to the end, from the newest checkpoint that loads if there is one."""

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
from tests.support.running import data, sae, texts, trainer

STEPS = 90


class Metrics(L.Callback):
    """Appends a line of metrics for each step."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, i: int
    ) -> None:
        line = {"batch": float(batch.double().sum()), "loss": float(outputs["loss"])}
        self._write(trainer.global_step, line | self._logged(trainer, "train/"))
        time.sleep(0.01)  # so that kills hit everything, the saving too

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(-trainer.global_step, self._logged(trainer, "val/"))

    def _logged(self, trainer: L.Trainer, prefix: str) -> dict[str, float]:
        metrics = trainer.callback_metrics.items()  # those of the other stage are old, and not restored
        return {name: float(value) for name, value in metrics if name.startswith(prefix)}

    def _write(self, step: int, values: dict[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def main(folder: Path, lm: str) -> None:
    torch.set_num_threads(1)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dm = data(lm, texts(60), normalize="zscore")
    saving = ModelCheckpoint(folder / "kept", every_n_train_steps=3, save_last=True, filename="{step}")
    run = trainer(
        folder,
        callbacks=[Metrics(folder / f"metrics-{rank}.jsonl"), saving],
        max_steps=STEPS,
        val_check_interval=25,
        check_val_every_n_epoch=None,
        log_every_n_steps=1,
        strategy="ddp",
        devices=ranks,
    )
    model = sae(dm)
    run.fit(model, dm, ckpt_path=newest_checkpoint(folder))
    final = {"weights": model.state_dict(), "optimizer": run.optimizers[0].state_dict()}
    torch.save(final, folder / f"final-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
