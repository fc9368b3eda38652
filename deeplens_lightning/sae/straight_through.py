"""JumpReLU and the step function with straight-through gradients for the threshold.

Rajamanoharan et al. 2024 (arXiv 2407.14435), equations 11 and 12, with a rectangular kernel of width
`bandwidth` around the threshold. On CUDA the gradients are Triton kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deeplens_lightning.sae.kernel_choice import uses_triton


def jump_relu(pre: Tensor, threshold: Tensor, bandwidth: float, *, to_input: bool = False) -> Tensor:
    """`pre * (pre > threshold)`, with a straight-through gradient for the threshold.

    Args:
        pre: pre-activations `(..., d_sae)`.
        threshold: `(d_sae,)`, whose dtype may be wider.
        bandwidth: width of the kernel, in units of the pre-activations.
        to_input: let the kernel's gradient also reach the pre-activations (Anthropic's variant).
    """
    result: Tensor = _JumpReLU.apply(pre, threshold, bandwidth, to_input)  # type: ignore[no-untyped-call]
    return result


def step(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """`pre > threshold` as 0.0 or 1.0, with a straight-through gradient for the threshold alone."""
    result: Tensor = _Step.apply(pre, threshold, bandwidth)  # type: ignore[no-untyped-call]
    return result


def _kernel(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    return ((pre - threshold).abs() < bandwidth / 2).to(pre.dtype) / bandwidth


def _over_rows(grad: Tensor, like: Tensor) -> Tensor:
    wide = torch.promote_types(grad.dtype, like.dtype)
    return grad.flatten(0, -2).sum(0, dtype=wide).to(like.dtype)


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float, to_input: bool) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth, ctx.to_input = bandwidth, to_input
        return torch.where(pre > threshold, pre, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pre, threshold = ctx.saved_tensors
        if uses_triton(pre):
            from deeplens_lightning.sae.triton_kernels import jump_relu_gradients

            gradients = jump_relu_gradients(grad, pre, threshold, ctx.bandwidth, to_input=ctx.to_input)
            return *gradients, None, None
        through = grad * threshold * _kernel(pre, threshold, ctx.bandwidth)
        d_pre = torch.where(pre > threshold, grad, 0)
        d_pre = (d_pre + through).to(pre.dtype) if ctx.to_input else d_pre
        return d_pre, -_over_rows(through, threshold), None, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pre, threshold = ctx.saved_tensors
        if uses_triton(pre):
            from deeplens_lightning.sae.triton_kernels import step_gradient

            return None, step_gradient(grad, pre, threshold, ctx.bandwidth), None
        return None, -_over_rows(grad * _kernel(pre, threshold, ctx.bandwidth), threshold), None
