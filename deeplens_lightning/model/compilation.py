"""Compile the parts of a model between its hook points with `torch.compile`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from deeplens_lightning.model.cpu_kernels import has_replaced_forward
from deeplens_lightning.model.hook_points import HookPoint


@dataclass(slots=True)
class _Compiled:
    """What a compiled module had in place of its class's `forward`, and the number of contexts that use it."""

    replaced: Callable[..., Any] | None
    uses: int = 0


_modules: WeakKeyDictionary[nn.Module, _Compiled] = WeakKeyDictionary()
"""The compiled modules. Several data modules may share a model."""


@contextmanager
def compiled(base: nn.Module, layers: str, hook_points: Sequence[HookPoint]) -> Iterator[None]:
    """Compile the largest layers, and parts of layers, that have no hook point strictly inside.

    A hook inside a compiled module would not be called. At the end of the last context that uses it, a module has its own
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
                _compile(module)
                stack.callback(_release, module)
        yield


def _compile(module: nn.Module) -> None:
    if module not in _modules:
        _modules[module] = _Compiled(module.forward if has_replaced_forward(module) else None)
        module.forward = torch.compile(module.forward)
    _modules[module].uses += 1


def _release(module: nn.Module) -> None:
    """Give a module its own `forward` back if no other context uses the compiled one."""
    if (kept := _modules.get(module)) is None:
        return  # a model that is garbage with its data module: its weak references end first
    kept.uses -= 1
    if not kept.uses:
        del _modules[module], module.forward
        if kept.replaced is not None:
            module.forward = kept.replaced
