"""Measure the training time that each callback takes, with the quickstart or any other configuration.

    python examples/benchmarks/callback_cost.py configs/quickstart.yaml --max-steps 300

One run has all callbacks, and the time inside the hooks of each is measured. The cost is this time divided by the time
of the training loop without the callbacks (not counting validation and start, as in `FitSummary`). The time at the end
of training is shown separately, because it does not grow with the length of the run. Some callbacks work only on every
100th step, so use at least a few hundred steps.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint

from deeplens_lightning.callbacks import (
    ExtractSingleSample,
    FitSummary,
    LatentStatistics,
    Throughput,
    TopActivatingTokens,
)
from deeplens_lightning.cli.main import lightning_cli

TEXT = "The capital of France is Paris, and the tensor has the shape (batch, d_in)."


class Clock:
    """Measure the seconds spent in a callback's hooks, during training and at its end."""

    def __init__(self, callback: L.Callback) -> None:
        self.training = self.end = 0.0
        for hook in ("on_train_start", "on_train_batch_start", "on_train_batch_end", "on_train_end"):
            setattr(callback, hook, self._timed(getattr(callback, hook), at_end=hook == "on_train_end"))

    def _timed(self, hook: Callable[..., Any], *, at_end: bool) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> None:
            begun = _now()
            hook(*args, **kwargs)
            if at_end:
                self.end += _now() - begun
            else:
                self.training += _now() - begun

        return run


class _Loop(FitSummary):
    """Measure the time of the training loop as `FitSummary` does, without printing the summary."""

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pass

    @property
    def seconds(self) -> float:
        return self._seconds


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", default="configs/quickstart.yaml")
    parser.add_argument("--max-steps", type=int, default=300)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args(argv)
    watched: list[L.Callback] = [
        ExtractSingleSample(texts=[TEXT], every_n_steps=100),
        TopActivatingTokens(),
        LatentStatistics(),
        Throughput(),
    ]
    clocks = {type(callback).__name__: Clock(callback) for callback in watched}
    loop = (
        _Loop()
    )  # first in the list, so that its time does not include the other callbacks' end of training
    with tempfile.TemporaryDirectory() as root:
        sys.argv = sys.argv[:1]
        words = ["--config", args.config, "--trainer.logger", "false", "--trainer.default_root_dir", root]
        words += ["--trainer.limit_val_batches", "0", "--trainer.max_steps", str(args.max_steps)]
        words += ["--trainer.enable_progress_bar", "false"]
        cli = lightning_cli(words, run=False)
        ours = (FitSummary, Checkpoint, *map(type, watched))
        own = [c for c in cli.trainer.callbacks if not isinstance(c, ours)]
        cli.trainer.callbacks = [loop, *own, *watched]
        cli.trainer.fit(cli.model, cli.datamodule)
    bare = loop.seconds - sum(clock.training for clock in clocks.values())
    print(f"training loop without them: {bare:.2f} s for {cli.trainer.global_step} steps")
    for name, clock in clocks.items():
        print(
            f"{name:22}{clock.training / bare:+8.2%}, at the end {clock.end:.2f} s ({clock.end / bare:.2%})"
        )
    if args.out:
        costs = {name: {"training": c.training, "end": c.end} for name, c in clocks.items()}
        args.out.write_text(
            json.dumps({"seconds": bare, "max_steps": args.max_steps, "costs": costs}, indent=1)
        )


if __name__ == "__main__":
    main()
