"""Collectives over data-parallel ranks: gather objects, sum, average and take maxima of tensors.

Each function must be called on every rank. In a single process nothing is sent and the value is returned unchanged.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    """Number of ranks of the process group; 1 in a single process."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(value: T) -> list[T]:
    """Gather a picklable value from every rank: a list in the order of the ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def sum_in_rank_order(values: Tensor) -> Tensor:
    """Sum a tensor over ranks, elementwise and in the order of the ranks, so that all ranks hold the same bits."""
    return torch.stack(gather(values)).sum(0)


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum a tensor over ranks, elementwise; returns a tensor of the same shape and does not change `x`."""
    return _reduce(x, dist.ReduceOp.SUM)


def max_over_ranks(x: Tensor) -> Tensor:
    """Take the elementwise maximum of a tensor over ranks; for booleans this is True where any rank has True."""
    wire = torch.uint8 if x.dtype == torch.bool else x.dtype
    return _reduce(x.to(wire), dist.ReduceOp.MAX).to(x.dtype)


def mean_over_ranks(x: Tensor) -> Tensor:
    """Average a floating-point tensor over ranks, elementwise; returns a tensor of the same shape."""
    return sum_over_ranks(x) / world_size() if world_size() > 1 else x


def _reduce(x: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
    if world_size() == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x, op=op)
    return x
