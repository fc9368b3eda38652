"""A mode that refuses float64, as MPS does: on a CPU it finds what would stop a run on every Mac.

On MPS no float64 tensor can be made. On the CPU of a test, tensors of the host and of the device are not told apart, so
the rule is stricter there: no operation makes a float64 tensor, on any device. Sums that need more than float32 are made
outside torch, by `math.fsum` or in numpy. Only numbers pass, tensors without dimensions that were float64 before: torch
makes them of Python's own numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DOUBLE = (torch.float64, torch.complex128)


class RefusingFloat64(TorchDispatchMode):
    """Raise a TypeError at each operation that makes a float64 tensor."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.dtype in DOUBLE]
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        numbers = all(x.dim() == 0 and x.dtype in DOUBLE for x in given)
        if made and not (numbers and all(x.dim() == 0 for x in made)):
            raise TypeError(f"{func} makes a float64 tensor {tuple(made[0].shape)}, which MPS does not have")
        return out


def refusing(callback: L.Callback) -> L.Callback:
    """Run each of Lightning's hooks of a callback in the mode, and return the callback."""
    for name in dir(L.Callback):
        hook = getattr(callback, name)
        if not name.startswith("_") and callable(hook) and name != "state_key":
            setattr(callback, name, _refusing(hook))
    return callback


def _refusing(hook: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(hook)
    def run(*args: Any, **kwargs: Any) -> Any:
        with RefusingFloat64():
            return hook(*args, **kwargs)

    return run
