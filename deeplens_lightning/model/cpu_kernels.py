"""Faster kernels for what the model and the dictionary compute in float32: the same values up to rounding.

- GELU's tanh form is one kernel of torch, where transformers composes it of eight;
- a matrix product on a CPU goes to oneDNN, which torch brings, instead of the BLAS that torch calls by default.
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
"""0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))) (Hendrycks & Gimpel 2016, arXiv 1606.08415)."""

_tanh_gelu = partial(F.gelu, approximate="tanh")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` of x `(..., d_in)`; in float32 on a CPU by oneDNN, unless gradients or a compiler are at work.

    Args:
        x: `(..., d_in)`.
        weight: `(d_out, d_in)`.
        bias: `(d_out,)`, or None.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    exact = x.dtype == weight.dtype == torch.float32
    if x.device.type == "cpu" and exact and torch.backends.mkldnn.is_available():
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return result
    return F.linear(x, weight, bias)


def replaceable(model: nn.Module) -> list[nn.Module]:
    """The modules that `faster` can run with other kernels.

    In lower precision every kernel rounds, and rows are to be the model's own: there are none; nor are there in a
    model of sharded tensors. A module whose `forward` somebody else replaced keeps it.
    """
    if not all(x.dtype == torch.float32 and type(x.data) is Tensor for x in model.parameters()):
        return []
    kinds = (nn.Linear, *TANH_GELU)
    return [module for module in model.modules() if type(module) in kinds and "forward" not in vars(module)]


@contextmanager
def faster(modules: Sequence[nn.Module]) -> Iterator[None]:
    """What `replaceable` found, with faster kernels; afterwards they are as they were."""
    for module in modules:
        module.forward = partial(_linear_of, module) if isinstance(module, nn.Linear) else _tanh_gelu
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _linear_of(module: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, module.weight, module.bias)
