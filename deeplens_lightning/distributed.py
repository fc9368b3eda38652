"""Collectives: gather objects from data-parallel ranks; sum, average and take maxima of tensors over all processes.

Each function must be called on every rank. In a single process nothing is sent and the value is returned unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Ranks(Protocol):
    """The ranks of a collective, as in `types.Placement`."""

    @property
    def ranks(self) -> int:
        """Number of data-parallel ranks."""
        ...

    @property
    def group(self) -> Any:
        """Process group of the data-parallel ranks; None for the group of all processes."""
        ...


class RankError(RuntimeError):
    """Another rank failed, so that this one cannot continue."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    """What a function returned on one rank, or the error that it raised there."""

    value: Any = None
    error: str | None = None


def world_size() -> int:
    """Number of ranks of the process group; 1 in a single process."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(value: T, among: Ranks | None = None) -> list[T]:
    """Gather a picklable value from every rank of `among`, by default of all processes: a list in the order of ranks."""
    ranks, group = (world_size(), None) if among is None else (among.ranks, among.group)
    if ranks == 1:
        return [value]
    values: list[T | None] = [None] * ranks
    dist.all_gather_object(values, value, group=group)
    return values  # type: ignore[return-value]


def on_every_rank(make: Callable[[], T], among: Ranks) -> list[T]:
    """Call a function on every rank of `among` and gather the results; if it fails on one rank, all ranks raise.

    Args:
        make: returns a picklable value; must not contain a collective, which the other ranks would wait for.
        among: the ranks.

    Raises:
        Exception: the error of `make` on this rank.
        RankError: `make` failed on other ranks only; the message has their errors.
    """
    if among.ranks == 1:
        return [make()]
    failure: Exception | None = None
    try:
        mine = _Outcome(value=make())
    except Exception as error:  # noqa: BLE001  raised again below, when the other ranks know of it
        failure, mine = error, _Outcome(error=f"{type(error).__name__}: {error}")
    everyone = gather(mine, among)
    if failure is not None:
        raise failure
    failed = [f"rank {rank} failed with {one.error}" for rank, one in enumerate(everyone) if one.error]
    if failed:
        raise RankError("; ".join(failed))
    return [one.value for one in everyone]


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
