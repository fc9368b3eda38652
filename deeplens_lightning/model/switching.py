"""Undo what a model changes about itself in its forward pass: BigBird replaces its attention in short texts.

In: a base model. Out: a context in which it may run, and after which its modules are as before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import nn


@runtime_checkable
class _Switching(Protocol):
    """A module of BigBird, which replaces its attention by another kind when a text is short."""

    attention_type: str
    """The present kind."""

    def set_attention_type(self, value: str) -> Any:
        """Replace the attention."""
        ...


@dataclass(frozen=True, slots=True)
class _State:
    """The attention of one module: its kind, and the children of the module."""

    module: nn.Module
    kind: str
    children: dict[str, nn.Module]

    @classmethod
    def of(cls, module: nn.Module) -> _State:
        return cls(module, cast(_Switching, module).attention_type, dict(module.named_children()))

    def restore(self) -> None:
        cast(_Switching, self.module).attention_type = self.kind
        for name, child in self.children.items():
            setattr(self.module, name, child)


class SwitchedAttention:
    """Keeps the modules of a model as they are around its forward passes.

    A replaced attention is kept for later texts of at most the same length: making it draws random numbers.

    Args:
        base: the base model.
    """

    def __init__(self, base: nn.Module) -> None:
        self._modules = [module for module in base.modules() if isinstance(module, _Switching)]
        self._replaced: Sequence[_State] = ()
        self._reach = 0  # longest sequence for which the model replaced its attention, in tokens

    @contextmanager
    def kept(self, length: int) -> Iterator[None]:
        """Let the model run on sequences of `length` tokens, and restore its modules at the end of the context."""
        if not self._modules:
            yield
            return
        before = [_State.of(module) for module in self._modules]
        if length <= self._reach:
            for state in self._replaced:
                state.restore()
        try:
            with torch.random.fork_rng(devices=[], enabled=length > self._reach):
                yield
        finally:
            after = [_State.of(module) for module in self._modules]
            if [state.kind for state in after] != [state.kind for state in before] and length > self._reach:
                self._replaced, self._reach = after, length
            for state in before:
                state.restore()
