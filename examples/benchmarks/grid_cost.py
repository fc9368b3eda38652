"""Measure the overhead of training several SAEs on one stream (`SparseAutoencoderGrid`).

    python examples/benchmarks/grid_cost.py --steps 40 --rounds 5

Every round measures three times with the same Trainer loop: the grid trains on the stream, the stream runs for a module
that does nothing, and each SAE trains alone on batches in memory. The cost is the first time divided by the sum of the
others. The median over the rounds is printed, and all times are written to a JSON file.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
from torch import Tensor

from deeplens_lightning import ActivationDataModule, SparseAutoencoder, SparseAutoencoderGrid


class Idle(L.LightningModule):
    """A module that does nothing with its batches."""

    automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        return None

    def configure_optimizers(self) -> None:
        return None


class Clock(L.Callback):
    """Measure the seconds after step `skip`, when buffers and caches are warm."""

    def __init__(self, skip: int) -> None:
        self.skip, self.begun, self.seconds = skip, 0.0, 0.0

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, i: int) -> None:
        if i + 1 == self.skip:
            self.begun = time.perf_counter()
        self.seconds = time.perf_counter() - self.begun


def seconds(module: L.LightningModule, batches: Any, steps: int, skip: int) -> float:
    clock = Clock(skip)
    L.Trainer(
        limit_train_batches=steps + skip,
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        callbacks=[clock],
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, batches)
    return clock.seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo:lm")
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--hook", default="mlp_act")
    parser.add_argument("--d-sae", type=int, default=3072)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--k", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--steps", type=int, default=40, help="batches that are timed")
    parser.add_argument("--skip", type=int, default=10, help="batches before them that are not timed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("grid_cost.json"))
    args = parser.parse_args()

    def data() -> ActivationDataModule:
        # the buffer is full from the first step, so that every run computes the same number of rows as it serves
        return ActivationDataModule(
            args.model, args.layer, args.hook, batch_size=args.batch_size, buffer_size=4 * args.batch_size
        )

    stored = data()
    stored.setup("fit")
    rows = [batch.clone() for batch in islice(stored.train_dataloader(), args.steps + args.skip)]
    d_in = stored.d_in
    stored.teardown("fit")
    rounds = []
    for _ in range(args.rounds):
        grid = SparseAutoencoderGrid(d_in, {"k": args.k}, {"d_sae": args.d_sae})
        found = {
            "grid": seconds(grid, data(), args.steps, args.skip),
            "stream": seconds(Idle(), data(), args.steps, args.skip),
            "saes": [
                seconds(
                    SparseAutoencoder(d_in, args.d_sae, k=k),
                    torch.utils.data.DataLoader(rows, batch_size=None),
                    args.steps,
                    args.skip,
                )
                for k in args.k
            ],
        }
        found["cost"] = found["grid"] / (found["stream"] + sum(found["saes"]))
        rounds.append(found)
        print(found, flush=True)
    cost = median(found["cost"] for found in rounds)
    print(f"time of a grid of {len(args.k)} SAEs / (time of the stream + times of their steps): {cost:.3f}")
    settings = {name: str(value) for name, value in vars(args).items()}
    args.out.write_text(json.dumps({"cost": cost, "rounds": rounds, "settings": settings}, indent=2))


if __name__ == "__main__":
    main()
