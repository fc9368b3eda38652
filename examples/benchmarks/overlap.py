"""How well text, model and mixer run beside each other, with a model that only sleeps, as a GPU does to the host.

    OMP_WAIT_POLICY=passive python examples/benchmarks/overlap.py

Without that variable OpenMP's threads keep the cores busy while they wait, which a GPU's host does not do to this extent.
Each stage is measured alone and then all of them together, in turns, in one process: with threads as on an accelerator,
and without. The stream should keep 0.9 of its slowest stage.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor

from deeplens_lightning import ActivationDataModule
from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.model.hook_points import HookPoint
from deeplens_lightning.model.rows import run_model
from deeplens_lightning.stream.arrivals import BlockArrivals, RowArrivals
from deeplens_lightning.stream.computed_batches import ComputedBatch
from deeplens_lightning.stream.live_stream import LiveStream
from deeplens_lightning.stream.prefetch import Prefetch
from deeplens_lightning.stream.rotating_shuffle import RotatingShuffle
from deeplens_lightning.text.packing import Blocks
from deeplens_lightning.types import BlockPosition, RowPosition, Served


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", type=float, default=500_000, help="tokens a second of the model")
    parser.add_argument("--d-in", type=int, nargs="+", default=[64, 768])
    parser.add_argument("--tokens", type=int, default=1_000_000, help="tokens per measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--buffer-rows", type=int, default=32_768)
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--inference-batch-size", type=int, default=128, help="blocks per model batch")
    parser.add_argument("--out", help="JSON file for the figures")
    return parser.parse_args(argv)


class SleepingModel:
    """Stands in for a `FrozenModel`: sleeps as long as the tokens take, and returns the same activations each time."""

    isolation = "packed"
    device = torch.device("cpu")

    def __init__(self, d_in: int, tokens: int, rate: float) -> None:
        point = HookPoint(name="resid", module="", side="out", layer=None, d_in=d_in)
        self.hook_points, self.dtypes = (point,), {point.name: torch.float32}
        self._rows, self._rate = torch.randn(tokens, d_in), rate

    def activations(self, tokens: Tensor, *_: Any) -> dict[str, Tensor]:
        """`(B, T, d_in)`, after the time that a model of this rate takes."""
        time.sleep(tokens.numel() / self._rate)
        return {"resid": self._rows[: tokens.numel()].view(*tokens.shape, -1)}


def rate(tokens: int, items: Iterator[Any], count: Callable[[Any], int], skip: int = 1) -> float:
    """Tokens a second while taking items that hold `tokens` in all, after `skip` tokens, in whole items, untimed."""
    seen = 0
    while seen < skip:
        seen += count(next(items))
    seen, begun = 0, time.perf_counter()
    for item in items:
        seen += count(item)
        if seen >= tokens:
            break
    return seen / (time.perf_counter() - begun)


def measure(args: argparse.Namespace, data: ActivationDataModule, d_in: int) -> dict[str, list[float]]:
    assert data.live is not None
    size = args.inference_batch_size
    model = cast(FrozenModel, SleepingModel(d_in, size * args.seq_length, args.rate))
    text = data.live.text("train")
    plain = LiveStream(
        model=model,
        text=text,
        batch_size=args.batch_size,
        buffer_rows=args.buffer_rows,
        buffer_device=torch.device("cpu"),
        inference_batch_size=size,
        seed=0,
    )
    beside = replace(plain, ahead=1, text=replace(text, threads=1))
    chunk = next(text.chunks(0)).blocks
    parts = [chunk.select(torch.arange(at, at + size)) for at in range(0, len(chunk) - size + 1, size)]

    skip = 2 * args.buffer_rows  # while the windows of the shuffle grow, more rows are computed than served

    def kept(blocks: Blocks) -> int:
        return int(blocks.keep.sum())

    def rows(served: Served) -> int:
        return len(served.provenance)

    def texts() -> float:
        return rate(args.tokens, replace(text, threads=1).chunks(0), lambda chunk: kept(chunk.blocks))

    def models() -> float:
        outs = (run_model(model, part) for part in cycle(parts))
        return rate(args.tokens, outs, lambda out: len(out.kept))

    def mixer() -> float:
        out = run_model(model, parts[0])
        group = BlockPosition()
        batch = ComputedBatch(group=group, number=0, out=out, tokens=len(out.kept), outliers=0)
        arrivals = RowArrivals(
            blocks=BlockArrivals(iter(()), group),
            computed=cycle([batch]),
            buffers=plain._allocated(),
            writer=None,
            start=RowPosition(blocks=group),
            enter=False,
        )
        shuffle = RotatingShuffle(
            batch_size=args.batch_size,
            capacity=args.buffer_rows,
            first_window=args.batch_size,
            entropy=(0,),
        )
        return rate(
            args.tokens, shuffle.serve(plain._allocated(), arrivals), lambda mixed: len(mixed.tensors[0])
        )

    def streamed() -> float:
        ahead = Prefetch(lambda: beside.batches(beside.start(0), 0), 2, lambda served: served.rows.values())
        try:
            return rate(args.tokens, ahead, rows, skip)
        finally:
            ahead.close()
            beside.close()

    def in_turn() -> float:
        return rate(args.tokens, plain.batches(plain.start(0), 0), rows, skip)

    contenders = {"text": texts, "model": models, "mixer": mixer, "stream": streamed, "in turn": in_turn}
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(args.rounds + 1):
        for name, contender in contenders.items():
            value = contender()
            if number:  # the first round warms up
                found[name].append(value)
    return found


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    data = ActivationDataModule(seq_length=args.seq_length, inference_batch_size=args.inference_batch_size)
    data.setup("fit")
    tables = {}
    for d_in in args.d_in:
        found = measure(args, data, d_in)
        middle = {name: median(values) for name, values in found.items()}
        slowest = min(("text", "model", "mixer"), key=middle.__getitem__)
        print(f"d_in {d_in}")
        for name, value in middle.items():
            share = (
                f", {value / middle[slowest]:.2f} of the slowest stage"
                if name in ("stream", "in turn")
                else ""
            )
            print(f"  {name:8s} {value:12,.0f} tokens/s{share}")
        print(f"  the slowest stage is the {slowest}")
        tables[d_in] = found
    data.teardown("fit")
    if args.out:
        Path(args.out).write_text(
            json.dumps({"settings": vars(args), "tokens_per_s": tables}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
