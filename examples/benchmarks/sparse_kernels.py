"""Compare each Triton kernel with the torch operations that it replaces: time, difference, repeatability.

    python examples/benchmarks/sparse_kernels.py --d-in 768 --d-sae 65536 --k 32 --dtype bfloat16

It needs a CUDA device and Triton (`pip install "deeplens-lightning[kernels]"`). Each round times every operation with
the kernel and with torch, in alternating order, by CUDA events; the table shows medians over the rounds. "error" is the
largest difference between the two results, relative to the largest value; "same bits" tells whether the kernel gave
the same bits in two calls.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from torch import Tensor

from deeplens_lightning.sae import kernel_choice, sparse, straight_through

Results = tuple[Tensor, ...]


@contextmanager
def kernels(on: bool) -> Iterator[None]:
    """Compute with the Triton kernels, or with torch."""
    with (
        patch.object(sparse, "uses_triton", lambda x: on),
        patch.object(straight_through, "uses_triton", lambda x: on),
    ):
        yield


def operations(args: argparse.Namespace, device: torch.device) -> dict[str, Callable[[], Results]]:
    """The operations, by the path that is chosen while this function runs; graphs are kept and run again."""
    torch.manual_seed(0)
    dtype: torch.dtype = getattr(torch, args.dtype)
    random = {"device": device, "dtype": dtype}
    x = torch.randn(args.batch_size, args.d_in, **random)
    encoder = (torch.randn(args.d_sae, args.d_in, **random) / args.d_in**0.5).requires_grad_()
    decoder = encoder.detach().clone().requires_grad_()
    bias = torch.zeros(args.d_sae, **random).requires_grad_()
    with torch.no_grad():
        pieces = [sparse.top_k(p, args.k) for _, p in sparse.pre_activations(x, encoder, bias)]
        values, latents = (torch.cat(piece) for piece in zip(*pieces, strict=True))
    rows = torch.arange(args.batch_size, device=device).repeat_interleave(args.k)
    code = sparse.make_code(rows, latents.flatten(), args.batch_size, args.d_sae)
    values = values.flatten().relu()

    acts = values.clone().requires_grad_()
    summed = sparse._bag_sum(code.latents, decoder.detach(), code.bag_starts, acts)
    decoded = sparse.decode_entries(values, decoder, code)
    encoded = sparse.encode_entries(x, None, encoder, bias, values, code)
    grad_rows, grad_values = torch.randn_like(decoded), torch.randn_like(values)

    pre = torch.randn(args.jumprelu_batch_size, args.d_sae, **random).requires_grad_()
    threshold = torch.full((args.d_sae,), 0.5, device=device).requires_grad_()
    jumped = straight_through.jump_relu(pre, threshold, 0.5)
    stepped = straight_through.step(pre, threshold, 0.5).sum(1).mean()
    grad_pre = torch.randn_like(jumped)

    def backward(out: Tensor, inputs: list[Tensor], grad: Tensor | None = None) -> Callable[[], Results]:
        return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)

    return {
        "decode": lambda: (sparse.decode_entries(values, decoder.detach(), code),),
        "decode, backward to values": backward(summed, [acts], grad_rows),
        "decode, backward to W_dec": backward(decoded, [decoder], grad_rows),
        "encode, backward to W_enc and b_enc": backward(encoded, [encoder, bias], grad_values),
        "JumpReLU, backward": backward(jumped, [pre, threshold], grad_pre),
        "JumpReLU's step, backward": backward(stepped, [threshold]),
    }


def milliseconds(operation: Callable[[], Results]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    operation()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def compare(args: argparse.Namespace, device: torch.device) -> list[dict[str, float | str | bool]]:
    made = {}
    for on in (True, False):
        with kernels(on):
            made[on] = operations(args, device)
    lines = []
    for name in made[True]:
        times: dict[bool, list[float]] = {True: [], False: []}
        results: dict[bool, list[Results]] = {True: [], False: []}
        for i in range(args.warmup + args.rounds):
            for on in (True, False) if i % 2 else (False, True):
                with kernels(on):
                    if i < 2:
                        results[on].append(made[on][name]())
                    elif i < args.warmup:
                        made[on][name]()
                    else:
                        times[on].append(milliseconds(made[on][name]))
        (ours, again), (theirs, _) = results[True], results[False]
        error = max(
            float((a.double() - b.double()).abs().max() / b.double().abs().max())
            for a, b in zip(ours, theirs, strict=True)
        )
        lines.append(
            {
                "operation": name,
                "kernel_ms": median(times[True]),
                "torch_ms": median(times[False]),
                "ratio": median(b / a for a, b in zip(times[True], times[False], strict=True)),
                "error": error,
                "same_bits": all(torch.equal(a, b) for a, b in zip(ours, again, strict=True)),
            }
        )
        print(
            "{operation:38s}{kernel_ms:10.3f}{torch_ms:10.3f}{ratio:8.2f}x{error:11.1e}  {same_bits}".format(
                **lines[-1]
            ),
            flush=True,
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=24576)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument(
        "--jumprelu-batch-size", type=int, default=4096, help="rows of the dense pre-activations"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--warmup", type=int, default=10, help="rounds that are not timed, at least 2")
    parser.add_argument("--out", type=Path, default=None, help="write the table as JSON")
    args = parser.parse_args()
    if args.warmup < 2:
        parser.error(f"--warmup {args.warmup}: the first two rounds compile and compare; give 2 or more")
    if not torch.cuda.is_available():
        sys.exit("no CUDA device was found: run this on a machine with a GPU and a CUDA build of torch")
    if kernel_choice.MISSING:
        sys.exit("this is missing: " + "; ".join(kernel_choice.MISSING))
    device = torch.device("cuda", torch.cuda.current_device())
    card = torch.cuda.get_device_name(device)
    print(
        f"{card}, torch {torch.__version__}, {args.dtype}, d_in {args.d_in}, d_sae {args.d_sae}, k {args.k}"
    )
    print(f"{'':38s}{'kernel ms':>10s}{'torch ms':>10s}{'ratio':>9s}{'error':>11s}  same bits")
    lines = compare(args, device)
    if args.out is not None:
        settings = {name: str(value) for name, value in vars(args).items()}
        args.out.write_text(json.dumps({"card": card, "lines": lines, "settings": settings}, indent=2))


if __name__ == "__main__":
    main()
