"""Compare kernels with plain implementations of the same formulas: values and gradients, float32 and bfloat16.

In: a `Subject`. Out: a `Check` for each dtype. `PAIRS` is the table of kernels; a new kernel is one more entry. The
plain implementations run on the CPU in float64, on the same rounded numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deeplens_lightning.cli.doctor.subject import Found, Subject, check
from deeplens_lightning.model.isolation import relative_error
from deeplens_lightning.sae import sparse, straight_through

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 8 * 2**-8}
"""Largest relative error of a row of a result or of a gradient. In bfloat16 8 times the rounding of a number."""

ROWS, D_IN, D_SAE, K = 301, 77, 1000, 7
"""Sizes of the inputs, which no block of a kernel divides; some latents have no entry."""

BANDWIDTH = 0.5
"""Width of JumpReLU's straight-through kernel."""

ADVICE = "uninstall triton, so that torch computes instead, and report the device and the versions"


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Inputs of the kernels of one dtype.

    Attributes:
        x: `(rows, d_in)`, rows.
        center: `(d_in,)`, subtracted from rows before they are encoded.
        encoder: `(d_sae, d_in)`.
        bias: `(d_sae,)`.
        decoder: `(d_sae, d_in)`.
        values: `(n,)`, activations at the active entries, all positive.
        pre: `(rows, d_sae)`, pre-activations of JumpReLU, none of them where rounding decides on which side of an
            edge they are.
        threshold: `(d_sae,)`, its thresholds.
        rows: int64 `(n,)`, row of each entry, ascending.
        latents: int64 `(n,)`, latent of each entry.
    """

    x: Tensor
    center: Tensor
    encoder: Tensor
    bias: Tensor
    decoder: Tensor
    values: Tensor
    pre: Tensor
    threshold: Tensor
    rows: Tensor
    latents: Tensor

    @property
    def code(self) -> sparse.Code:
        """The active entries."""
        return sparse.make_code(self.rows, self.latents, len(self.x), len(self.encoder))

    def leaves(self) -> dict[str, Tensor]:
        """The tensors that kernels may differentiate, by name."""
        return {
            "x": self.x,
            "center": self.center,
            "encoder": self.encoder,
            "bias": self.bias,
            "decoder": self.decoder,
            "values": self.values,
            "pre": self.pre,
            "threshold": self.threshold,
        }

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Inputs:
        """A copy on a device in a dtype, whose leaves collect gradients."""
        copies = {
            name: x.detach().to(device).to(dtype, copy=True).requires_grad_()
            for name, x in self.leaves().items()
        }
        return Inputs(**copies, rows=self.rows.to(device), latents=self.latents.to(device))


@dataclass(frozen=True, kw_only=True)
class KernelPair:
    """A kernel, and a plain implementation of the same formula.

    Attributes:
        name: name of the kernel in the table.
        kernel: computes the result with the kernel, with a graph for the gradients.
        reference: the same without the kernel.
    """

    name: str
    kernel: Callable[[Inputs], Tensor]
    reference: Callable[[Inputs], Tensor]


def _encode(given: Inputs) -> Tensor:
    return sparse.encode_entries(
        given.x, given.center, given.encoder, given.bias, given.values.detach(), given.code
    )


def _encode_plainly(given: Inputs) -> Tensor:
    pre = (given.x - given.center) @ given.encoder.T + given.bias
    computed = pre[given.rows, given.latents]
    return (
        computed + (given.values - computed).detach()
    )  # the values of the kernel, the gradient of the formula


def _decode(given: Inputs) -> Tensor:
    return sparse.decode_entries(given.values, given.decoder, given.code)


def _decode_plainly(given: Inputs) -> Tensor:
    latents = given.values.new_zeros(len(given.x), len(given.decoder))
    return latents.index_put((given.rows, given.latents), given.values, accumulate=True) @ given.decoder


def _jump(given: Inputs) -> Tensor:
    return straight_through.jump_relu(given.pre, given.threshold, BANDWIDTH, to_input=True)


def _jump_plainly(given: Inputs) -> Tensor:
    through = (given.threshold * _near(given)).detach()
    moved = given.pre - given.pre.detach() - given.threshold + given.threshold.detach()  # 0, with gradients
    return torch.where(given.pre > given.threshold, given.pre, 0) + through * moved


def _step(given: Inputs) -> Tensor:
    return straight_through.step(given.pre, given.threshold, BANDWIDTH)


def _step_plainly(given: Inputs) -> Tensor:
    above = (given.pre > given.threshold).to(given.pre.dtype)
    return above + _near(given) * (given.threshold.detach() - given.threshold)


def _near(given: Inputs) -> Tensor:
    """The rectangular kernel around the threshold, `(rows, d_sae)`."""
    return ((given.pre - given.threshold).detach().abs() < BANDWIDTH / 2) / BANDWIDTH


PAIRS = (
    KernelPair(name="sparse encoding", kernel=_encode, reference=_encode_plainly),
    KernelPair(name="sparse decoding", kernel=_decode, reference=_decode_plainly),
    KernelPair(name="JumpReLU", kernel=_jump, reference=_jump_plainly),
    KernelPair(name="step function", kernel=_step, reference=_step_plainly),
)


@check("kernels, float32", target=f"relative error below {BOUNDS[torch.float32]:.0e}", advice=ADVICE)
def kernels_float32(subject: Subject, pairs: tuple[KernelPair, ...] = PAIRS) -> Found:
    """Compare values and gradients of every kernel in float32."""
    return _compare(subject, pairs, torch.float32)


@check("kernels, bfloat16", target=f"relative error below {BOUNDS[torch.bfloat16]:.0e}", advice=ADVICE)
def kernels_bfloat16(subject: Subject, pairs: tuple[KernelPair, ...] = PAIRS) -> Found:
    """Compare values and gradients of every kernel in bfloat16."""
    return _compare(subject, pairs, torch.bfloat16)


def _compare(subject: Subject, pairs: tuple[KernelPair, ...], dtype: torch.dtype) -> Found:
    inputs = _draw().to("cpu", dtype)
    errors = {pair.name: _error(pair, inputs, subject.device, dtype) for pair in pairs}
    return Found(
        passed=all(error < BOUNDS[dtype] for error in errors.values()),
        figure=", ".join(f"{name} {error:.1e}" for name, error in errors.items()),
        values=errors,
    )


def _error(pair: KernelPair, inputs: Inputs, device: torch.device, dtype: torch.dtype) -> float:
    """The largest relative error of a row of the result or of a gradient."""
    given, exact = inputs.to(device, dtype), inputs.to("cpu", torch.float64)
    found, wanted = pair.kernel(given), pair.reference(exact)
    upstream = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found.backward(upstream.to(device))
    wanted.backward(upstream.double())
    gradients = {name: x.grad for name, x in exact.leaves().items()}
    compared = [(found.detach(), wanted.detach())]
    for name, leaf in given.leaves().items():
        expected = gradients[name]
        if (leaf.grad is None) != (expected is None):
            raise ValueError(f"{pair.name}: only one of kernel and reference has a gradient for {name}")
        if leaf.grad is not None and expected is not None:
            compared.append((leaf.grad, expected))
    errors = [relative_error(*(torch.atleast_2d(x.cpu()) for x in both)) for both in compared]
    return max(float(error.max()) for error in errors)


def _draw() -> Inputs:
    """Random inputs in float32, whose entries are the largest pre-activations of each row."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, center = normal(ROWS, D_IN), 0.1 * normal(D_IN)
    encoder, bias = normal(D_SAE, D_IN) / D_IN**0.5, 0.1 * normal(D_SAE)
    pre, threshold = normal(ROWS, D_SAE), 0.5 + 0.5 * torch.rand(D_SAE, generator=generator)
    from_edges = torch.stack([(pre - threshold - edge).abs() for edge in (-BANDWIDTH / 2, 0, BANDWIDTH / 2)])
    pre = torch.where(from_edges.amin(0) < 0.03, -1.0, pre)
    values, latents = ((x - center) @ encoder.T + bias).topk(K, dim=1)
    return Inputs(
        x=x,
        center=center,
        encoder=encoder,
        bias=bias,
        decoder=normal(D_SAE, D_IN) / D_IN**0.5,
        values=values.flatten(),
        pre=pre,
        threshold=threshold,
        rows=torch.arange(ROWS).repeat_interleave(K),
        latents=latents.flatten(),
    )
