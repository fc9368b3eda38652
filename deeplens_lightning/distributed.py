"""Collectives over data-parallel ranks: gather objects, sum, average and take maxima of tensors.

Every rank must call each of them. In a single process nothing is sent and the values come back as they are.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    """Number of ranks that train together; 1 in a single process."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(value: T) -> list[T]:
    """The values of all ranks, in the order of the ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def sum_in_rank_order(values: Tensor) -> Tensor:
    """The elementwise sum over ranks, added in the order of the ranks, so that all ranks hold the same bits."""
    return torch.stack(gather(values)).sum(0)


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
