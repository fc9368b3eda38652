"""What the ranks tell each other: one object from each, or a sum of tensors. Alone, nothing is sent."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def gather(value: T) -> list[T]:
    """The values of all ranks, in the order of the ranks; every rank must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def total(values: Tensor) -> Tensor:
    """The elementwise sum over ranks, added in the order of the ranks, so that all hold the same bits."""
    return torch.stack(gather(values)).sum(0)
