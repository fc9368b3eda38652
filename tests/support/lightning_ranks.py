"""One `fit` on two ranks that Lightning starts: `python -m tests.support.lightning_ranks STRATEGY FOLDER MODEL`."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning as L
import torch

from tests.support.recorder import Recorder
from tests.support.training import data, sae, trainer


class Saved(Recorder):
    """Save the provenance of all rows of a rank at the end."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        rows = torch.cat([rows for _, rows in self.batches])
        torch.save(rows, self.folder / f"rows-{trainer.global_rank}.pt")
        trainer.strategy.barrier()  # this process must not end before the other rank has saved


def main(strategy: str, folder: Path, model: str) -> None:
    torch.set_num_threads(1)
    dm = data(model)
    run = trainer(folder, Saved(folder), strategy=strategy, devices=2, max_epochs=1, limit_val_batches=1)
    run.fit(sae(dm), dm)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
