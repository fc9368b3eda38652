"""Sums and maxima over the ranks that train together; nothing happens in a single process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Ranks that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """The same-shaped sum of every rank's `x`, equal on all ranks; `x` itself is left alone."""
    return _reduce(x, dist.ReduceOp.SUM)


def max_over_ranks(x: Tensor) -> Tensor:
    """The same-shaped maximum of every rank's `x`; booleans become "on any rank"."""
    wire = torch.uint8 if x.dtype == torch.bool else x.dtype
    return _reduce(x.to(wire), dist.ReduceOp.MAX).to(x.dtype)


def mean_over_ranks(x: Tensor) -> Tensor:
    """The same-shaped mean of every rank's floating-point `x`."""
    return sum_over_ranks(x) / world_size() if world_size() > 1 else x


def _reduce(x: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
    if world_size() == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x, op=op)
    return x
