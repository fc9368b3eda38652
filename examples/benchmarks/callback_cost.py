"""What each callback costs in training time, on the quickstart or any other configuration.

    python examples/benchmarks/callback_cost.py --config configs/quickstart.yaml --max-steps 300 --rounds 3

Runs with and without each callback take turns in one process; the time is that of the training loop
(validation and start aside, as `FitSummary` counts it), and the cost is the median over rounds of
`with / without - 1`. Looks fall on every 100th step, so take at least a few hundred steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable

import lightning as L

from deeplens_lightning.callbacks import (
    ExtractSingleSample,
    FitSummary,
    LatentStatistics,
    Throughput,
    TopActivatingTokens,
)
from deeplens_lightning.cli import lightning_cli

TEXTS = ["The capital of France is Paris.", "Returns a new tensor with the same data but of another shape."]
MAKE: dict[str, Callable[[], L.Callback]] = {
    "ExtractSingleSample": lambda: ExtractSingleSample(texts=TEXTS, every_n_steps=100),
    "TopActivatingTokens": lambda: TopActivatingTokens(),
    "LatentStatistics": lambda: LatentStatistics(),
    "Throughput": lambda: Throughput(),
}


class _Seconds(FitSummary):
    """The summary's clock, and nothing printed; what callbacks do at the end of training counts too."""

    seconds = 0.0

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self.seconds = self._seconds

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pass


def seconds_of(config: str, max_steps: int, callbacks: list[L.Callback]) -> float:
    """Seconds in the training loop of one run."""
    with tempfile.TemporaryDirectory() as root:
        words = ["fit", "--config", config, "--trainer.logger", "false", "--trainer.default_root_dir", root]
        words += ["--trainer.limit_val_batches", "0", "--trainer.max_steps", str(max_steps)]
        words += ["--trainer.enable_progress_bar", "false", "--trainer.enable_checkpointing", "false"]
        cli = lightning_cli(words, run=False)
        clock = _Seconds()  # last, so that the others' end of training is inside
        own = [c for c in cli.trainer.callbacks if not isinstance(c, _OURS)]
        cli.trainer.callbacks = [*own, *callbacks, clock]
        cli.trainer.fit(cli.model, cli.datamodule)
        return clock.seconds


_OURS = (FitSummary, Throughput, ExtractSingleSample, LatentStatistics, TopActivatingTokens)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--max-steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--callbacks", nargs="+", choices=list(MAKE), default=list(MAKE))
    parser.add_argument("--out", help="JSON file for the results")
    args = parser.parse_args(argv)
    costs: dict[str, list[float]] = {name: [] for name in args.callbacks}
    for number in range(args.rounds):
        bare = seconds_of(args.config, args.max_steps, [])
        for name in args.callbacks:
            costs[name].append(seconds_of(args.config, args.max_steps, [MAKE[name]()]) / bare - 1)
        print(f"round {number + 1}: without callbacks {bare:.1f} s", flush=True)
    for name, values in costs.items():
        each = ", ".join(f"{value:+.1%}" for value in values)
        print(f"{name:22}{statistics.median(values):+.2%}   ({each})")
    if args.out:
        with open(args.out, "w", encoding="utf-8") as file:  # noqa: PTH123
            json.dump({"max_steps": args.max_steps, "costs": costs}, file, indent=1)


if __name__ == "__main__":
    main()
