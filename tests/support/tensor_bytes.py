"""Count the bytes of the tensors that are alive in a piece of code."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorBytes(TorchDispatchMode):
    """Inside `with TensorBytes() as counted:`, the memory of every tensor that an operation makes is counted.

    Attributes:
        now: bytes of those that are alive.
        peak: the most that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(found):
            if isinstance(x, torch.Tensor) and storage(x) not in given | self._alive.keys():
                self._add(x.untyped_storage())
        return found

    def _add(self, made: torch.UntypedStorage) -> None:
        self._alive[made._cdata] = made.nbytes()
        self.now += made.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(made, self._remove, made._cdata)

    def _remove(self, key: int) -> None:
        self.now -= self._alive.pop(key)


def storage(x: torch.Tensor) -> int:
    """The address of the memory that a tensor is a view of."""
    return x.untyped_storage()._cdata
