"""Keep running means, thresholds and normalisation in float32 when a module is converted to another precision."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from typing_extensions import Self


class Float32State(nn.Module):
    """Base class of modules whose own parameters and buffers keep their dtype; its submodules are converted.

    Precision `bf16-true`, `16-true` or `64-true`, `half()` and `to(dtype)` convert whole modules. In bfloat16 a running
    mean stops at the value where an update is smaller than the rounding, and 39.54 becomes 39.5.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if recurse:
            for child in self.children():
                child._apply(fn)
        super()._apply(partial(_without_dtype, fn), recurse=False)  # type: ignore[no-untyped-call]
        return self


def _without_dtype(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The result of a conversion or move of x, with the dtype and the bits of x."""
    moved = fn(x)
    return moved if moved.dtype == x.dtype else x.to(moved.device)
