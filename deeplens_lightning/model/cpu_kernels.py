"""Faster float32 kernels on a CPU for linear layers and GELU: the same values up to rounding.

- The tanh form of GELU is a single kernel in torch; transformers composes it of eight.
- A matrix product goes to oneDNN, which is part of torch, instead of the BLAS that torch calls by default.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import FastGELUActivation, NewGELUActivation

TANH_GELU = (NewGELUActivation, FastGELUActivation)
"""Modules for 0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))) (Hendrycks & Gimpel 2016, arXiv 1606.08415)."""

_tanh_gelu = partial(F.gelu, approximate="tanh")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, computed by oneDNN in float32 on a CPU.

    Under autograd, autocast or `torch.compile`, and for other dtypes and devices, it is `F.linear` itself.

    Args:
        x: `(..., d_in)`.
        weight: `(d_out, d_in)`.
        bias: `(d_out,)`, or None.

    Returns:
        `(..., d_out)`.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    exact = x.dtype == weight.dtype == torch.float32
    if x.device.type == "cpu" and exact and torch.backends.mkldnn.is_available():
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return result
    return F.linear(x, weight, bias)


def has_replaced_forward(module: nn.Module) -> bool:
    """Whether the module itself holds a `forward` in place of the one of its class, as accelerate's hooks do."""
    # Reading `module.forward` finds either one, so only a look at the instance's own attributes distinguishes them.
    return "forward" in vars(module)


def replaceable(model: nn.Module) -> list[nn.Module]:
    """The modules that `faster` can run with other kernels.

    There are none in a model with a parameter that is not a plain float32 tensor: in lower precision another kernel
    rounds differently, and rows have to equal the model's own. There are none in a model with a parameter on another
    device, either. A module with a replaced `forward` keeps it.
    """
    plain = (torch.float32, Tensor, "cpu")
    if not all((x.dtype, type(x.data), x.device.type) == plain for x in model.parameters()):
        return []
    kinds = (nn.Linear, *TANH_GELU)
    return [
        module for module in model.modules() if type(module) in kinds and not has_replaced_forward(module)
    ]


@contextmanager
def faster(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Run modules that `replaceable` returned with faster kernels until the context ends."""
    for module in modules:
        module.forward = partial(_linear_of, module) if isinstance(module, nn.Linear) else _tanh_gelu
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _linear_of(module: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, module.weight, module.bias)
