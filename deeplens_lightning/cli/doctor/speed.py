"""Measure speeds on the user's device: the stream against the bare model, an SAE step against a matrix product.

In: a `Subject`. Out: a `Check` each, which counts as a failure only under `--strict`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from deeplens_lightning.cli.bench import compare
from deeplens_lightning.cli.doctor.subject import Found, Subject, check
from deeplens_lightning.sae import Dictionary

STREAM_TARGET = 0.97
"""Speed of the stream over that of the bare model."""

STEP_TARGET = 0.5
"""Rate of an SAE step over that of a matrix product."""

K = 32
REPEATS = 5


@check(
    "stream / bare model",
    target=f"at least {STREAM_TARGET}",
    advice="run `deeplens-lightning bench` on an idle machine, with a larger --data.inference_batch_size",
    speed=True,
)
def stream_speed(subject: Subject) -> Found:
    """Measure the tokens per second of the stream and of the bare model, on the same model batches in turns."""
    data = subject.data(batch_size=2048, buffer_size=8 * 2048)
    result = compare(data, subject.sizes.pairs, subject.sizes.model_batches)
    ratio, stream, bare = median(result.ratios), median(result.stream), median(result.bare)
    return Found(
        passed=ratio >= STREAM_TARGET,
        figure=f"{ratio:.3f} ({stream:,.0f} of {bare:,.0f} tokens/s)",
        values={"ratio": ratio, "stream": stream, "bare": bare},
    )


@check(
    "SAE step / matrix product",
    target=f"at least {STEP_TARGET}",
    advice="use larger batches (--data.batch_size), and on a GPU --trainer.precision=bf16-mixed",
    speed=True,
)
def step_speed(subject: Subject) -> Found:
    """Measure an SAE's training step, and the share that its FLOP/s are of those of a plain matrix product.

    The step is a TopK SAE's with Adam, in bfloat16 autocast on CUDA. Its FLOPs are those of the encoder's matrix
    product, and of decoding and three gradients at the active latents: B (2 d_in d_sae + 8 k d_in).
    """
    sizes, device = subject.sizes, subject.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    width = subject.data().d_in
    d_in = width if isinstance(width, int) else sum(width.values())
    square = torch.randn(sizes.matmul, sizes.matmul, device=device, dtype=dtype)
    reachable = 2 * sizes.matmul**3 / _seconds(lambda: square @ square, device)
    rows = torch.randn(sizes.step_rows, d_in, generator=torch.Generator().manual_seed(0)).to(device)
    sae = Dictionary(d_in, sizes.step_latents, k=K).to(device)
    sae.prepare(None)
    sae.initialize_from(rows)
    optimizer = torch.optim.Adam([sae.parameter_group()], fused=device.type in ("cpu", "cuda"))

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = sae.step(rows).loss
        loss.backward()
        sae.prepare_gradients()
        optimizer.step()
        sae.project()

    seconds = _seconds(step, device)
    reached = sizes.step_rows * d_in * (2 * sizes.step_latents + 8 * K) / seconds
    share = reached / reachable
    return Found(
        passed=share >= STEP_TARGET,
        figure=f"{share:.2f} ({reached / 1e9:,.0f} of {reachable / 1e9:,.0f} GFLOP/s; "
        f"{sizes.step_rows / seconds:,.0f} rows/s, {d_in} to {sizes.step_latents:,} latents)",
        values={
            "share": share,
            "flops": reached,
            "matmul_flops": reachable,
            "rows": sizes.step_rows / seconds,
        },
    )


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The median time of a call, after two calls that are not counted."""
    taken = []
    for _ in range(REPEATS + 2):
        _finish(device)
        begun = time.perf_counter()
        work()
        _finish(device)
        taken.append(time.perf_counter() - begun)
    return median(taken[2:])


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
