"""Compile the parts of a model between its hook points with `torch.compile`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from deeplens_lightning.model.cpu_kernels import has_replaced_forward
from deeplens_lightning.model.hook_points import HookPoint


@contextmanager
def compiled(base: nn.Module, layers: str, hook_points: Sequence[HookPoint]) -> Iterator[None]:
    """Compile the largest layers, and parts of layers, that have no hook point strictly inside.

    A hook inside a compiled module would not be called. At the end of the context every module has its own
    `forward` again.

    Args:
        base: the base model.
        layers: path of its list of layers.
        hook_points: where activations are read.
    """
    hooked = [point.module for point in hook_points]
    with ExitStack() as stack:
        pending = [f"{layers}.{name}" for name, _ in base.get_submodule(layers).named_children()]
        while pending:
            path = pending.pop()
            module = base.get_submodule(path)
            if any(other.startswith(f"{path}.") for other in hooked):
                pending.extend(f"{path}.{name}" for name, _ in module.named_children())
            else:
                replaced = module.forward if has_replaced_forward(module) else None
                stack.callback(_restore_forward, module, replaced)
                module.forward = torch.compile(module.forward)
        yield


def _restore_forward(module: nn.Module, replaced: Callable[..., Any] | None) -> None:
    """Remove the compiled `forward`, and put one that the module had in place of its class's `forward` back."""
    del module.forward
    if replaced is not None:
        module.forward = replaced
