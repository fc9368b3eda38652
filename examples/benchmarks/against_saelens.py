"""Compare the speed of this library with SAELens: an SAE's training step, the stream, both together, and a cache.

    pip install 'deeplens-lightning[saelens]'
    python examples/benchmarks/against_saelens.py --model PATH_OF_SMOLLM2_135M --layer 10 --hook mlp_out \\
        --saelens-hook model.layers.10.mlp --d-sae 8192 --k 32 --batch-size 2048 --seq-length 256

Both libraries take turns in one process on the same text and with the same sizes. The table shows median rates and
the median over pairs of turns of the ratio. `--parts quality` trains an SAE of each library on the same batches and
compares held-out FVU and dead latents. Results are written to a JSON file. For a GPU add
`--device cuda --bf16 --d-sae 65536`.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from contenders import Ours, Theirs, endless, our_data, their_store, write_caches
from timing import Line, take_turns
from torch import Tensor

from deeplens_lightning.sae.metrics import HeldOutMetrics
from deeplens_lightning.sae.schedule import Optimization, lr_factor

PARTS = ("step", "memory", "stream", "end-to-end", "cache", "quality")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS[:-1]))
    parser.add_argument("--model", default="demo:lm", help="demo:lm, a local folder or a hub id")
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--hook", default="mlp_out")
    parser.add_argument(
        "--saelens-hook", help="module path of the same hook point; default GPT-2's MLP of that layer"
    )
    parser.add_argument("--dataset", default="demo:docs")
    parser.add_argument("--d-sae", type=int, default=8192)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument(
        "--architectures", nargs="+", default=["topk"], help="of the quality part: topk, batch_topk"
    )
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--inference-batch-size", type=int, default=16)
    parser.add_argument("--buffer-batches", type=int, default=16, help="both shuffle buffers, in batches")
    parser.add_argument("--val-rows", type=int, default=200_000, help="held-out rows of the quality part")
    parser.add_argument("--shards", help="a cache for the quality part to read instead of running the model")
    parser.add_argument("--val-fraction", type=float, default=0.05, help="share of documents held out")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="training rows of the quality part")
    parser.add_argument("--saelens-lr", type=float, default=3e-4)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3, help="pairs that are not counted")
    parser.add_argument(
        "--unit",
        type=int,
        help="batches in one turn; default half a buffer, because SAELens refills half a buffer at once",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast of both SAEs' steps")
    parser.add_argument("--compile-model", action="store_true", help="torch.compile our frozen model")
    parser.add_argument("--compile-sae", action="store_true", help="torch.compile our SAE's loss")
    parser.add_argument("--output", type=Path, default=Path("benchmark.json"))
    parser.add_argument("--measure-memory", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--d-in", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.saelens_hook = args.saelens_hook or f"transformer.h.{args.layer}.mlp"
    args.planned_tokens = None
    args.unit = args.unit or args.buffer_batches // 2
    return args


def fixed_batches(args: argparse.Namespace, d_in: int) -> list[Tensor]:
    """Four batches of random rows with unequal variances, as activations have, to time the SAE's step without a model."""
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(d_in, d_in, generator=g) * torch.linspace(1, 0.05, d_in)
    return [(torch.randn(args.batch_size, d_in, generator=g) @ mix).to(args.device) for _ in range(4)]


def measure_step(args: argparse.Namespace, d_in: int) -> Line:
    ours, theirs, batches = Ours(args, d_in, "topk"), Theirs(args, d_in, "topk"), fixed_batches(args, d_in)

    def unit(side: Ours | Theirs) -> None:
        for batch in batches[: args.unit]:
            side.step(batch)

    return _turns(args, "SAE step", min(args.unit, 4), lambda: unit(ours), lambda: unit(theirs))


def measure_stream(args: argparse.Namespace, ours: Iterator[Tensor], theirs: Iterator[Tensor]) -> Line:
    return _turns(
        args, "stream", args.unit, lambda: _consume(ours, args.unit), lambda: _consume(theirs, args.unit)
    )


def measure_training(
    name: str, args: argparse.Namespace, d_in: int, ours: Iterator, theirs: Iterator
) -> Line:
    our_side, their_side = Ours(args, d_in, "topk"), Theirs(args, d_in, "topk")

    def unit(side: Ours | Theirs, batches: Iterator[Tensor]) -> None:
        for batch in islice(batches, args.unit):
            side.step(batch)

    return _turns(args, name, args.unit, lambda: unit(our_side, ours), lambda: unit(their_side, theirs))


def measure_cache(args: argparse.Namespace, d_in: int, source: Iterator[Tensor]) -> list[Line]:
    rows = torch.cat([batch.cpu() for batch in islice(source, 16)])
    with tempfile.TemporaryDirectory() as folder:
        shard, arrow = write_caches(rows, args, Path(folder))
        ours = endless(our_data(args, shards=shard))
        theirs = their_store(args, d_in, arrow)
        read = _turns(
            args,
            "cached reading",
            args.unit,
            lambda: _consume(ours, args.unit),
            lambda: _consume(theirs, args.unit),
        )
        return [read, measure_training("cached reading + training", args, d_in, ours, theirs)]


def measure_memory(d_in: int) -> dict[str, float]:
    """Peak memory of three steps in MB, without weights, optimizer state and batches; each library in its own process."""
    peaks = {}
    for side in ("ours", "theirs"):
        command = [sys.executable, __file__, *sys.argv[1:], "--measure-memory", side, "--d-in", str(d_in)]
        peaks[side] = float(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
        )
    ratio = peaks["ours"] / peaks["theirs"]
    print(f"{'memory of the step, MB':28s} {peaks['ours']:10.0f} {peaks['theirs']:10.0f} {ratio:8.2f}")
    return {"ours_mb": peaks["ours"], "saelens_mb": peaks["theirs"], "ratio": ratio}


def report_memory(args: argparse.Namespace) -> None:
    side = (Ours if args.measure_memory == "ours" else Theirs)(args, args.d_in, "topk")
    batches = fixed_batches(args, args.d_in)
    for p in side.sae.parameters():  # allocate gradients and Adam's moments first: they are not counted
        p.grad = torch.zeros_like(p)
    (side.optimizer if isinstance(side, Ours) else side.trainer.optimizer).step()
    gc.collect()
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak that VmHWM shows
        before = _status("VmRSS")
    for batch in batches[:3]:
        side.step(batch)
    peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else _status("VmHWM")
    print((peak - before) / 2**20)


def measure_quality(args: argparse.Namespace) -> list[dict[str, float | str]]:
    """Train an SAE of each library on the same batches; returns held-out metrics such as FVU and dead latents."""
    data = our_data(args, args.shards)
    d_in = int(data.d_in)
    steps = args.tokens // args.batch_size
    args.planned_tokens = steps * args.batch_size
    factor = lr_factor(steps, Optimization())
    table = []
    for architecture in args.architectures:
        ours, theirs = Ours(args, d_in, architecture), Theirs(args, d_in, architecture, args.saelens_lr)
        for i, batch in enumerate(islice(endless(data), steps)):
            ours.set_lr_factor(factor(i))
            ours.step(batch)
            theirs.step(batch)
        held_out = list(data.val_dataloader())
        for side in (ours, theirs):
            metrics = HeldOutMetrics(args.d_sae, d_in, torch.device(args.device))
            with torch.no_grad():
                for batch in held_out:
                    metrics.update(batch, *side.reconstruct(batch))
            row: dict[str, float | str] = {"architecture": architecture, "library": side.name}
            row |= {name: float(value) for name, value in metrics.compute().items()}
            table.append(row)
            words = "{architecture:12s} {library:20s} FVU {fvu:.4f}  L0 {l0:.1f}  dead {dead_fraction:.4f}"
            print(words.format(**row))
    return table


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    if args.measure_memory:
        report_memory(args)
        return
    result: dict[str, object] = {
        "settings": {k: str(v) for k, v in vars(args).items()},
        "machine": {"processor": platform.processor(), "threads": args.threads, "torch": torch.__version__},
    }
    data = our_data(args, args.shards if args.parts == ["quality"] else None)
    d_in = int(data.d_in)
    print(f"{'rows per second':28s} {'ours':>10s} {'SAELens':>10s} {'ratio':>9s}")
    lines: list[Line] = []
    if "step" in args.parts:
        lines.append(measure_step(args, d_in))
    if "memory" in args.parts:
        result["memory"] = measure_memory(d_in)
    if {"stream", "end-to-end"} & set(args.parts):
        ours, theirs = endless(data), their_store(args, d_in)
        _consume(
            ours, 2 * args.buffer_batches
        )  # wait until both buffers are full: ours grows while it serves
        _consume(theirs, 2 * args.buffer_batches)
        if "stream" in args.parts:
            lines.append(measure_stream(args, ours, theirs))
        if "end-to-end" in args.parts:
            lines.append(measure_training("streaming + training", args, d_in, ours, theirs))
    if "cache" in args.parts:
        lines += measure_cache(args, d_in, endless(data))
    result["speed"] = [{**line.summary(), "ours_s": line.ours, "saelens_s": line.theirs} for line in lines]
    if "quality" in args.parts:
        result["quality"] = measure_quality(args)
    args.output.write_text(json.dumps(result, indent=2))
    print(f"written to {args.output}")


def _turns(args: argparse.Namespace, name: str, batches: int, ours, theirs) -> Line:
    cuda = args.device == "cuda"
    return take_turns(
        name, batches * args.batch_size, ours, theirs, pairs=args.pairs, warmup=args.warmup, cuda=cuda
    )


def _consume(batches: Iterator[Tensor], n: int) -> None:
    for _ in islice(batches, n):
        pass


def _status(field: str) -> float:
    """Read a field of /proc/self/status, in bytes."""
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(field))


if __name__ == "__main__":
    main()
