"""Run a model up to its deepest hook point and return the activations at all of them.

In: a base model, hook points and tokens. Out: activations `(batch, sequence, d_in)` by hook point. Hooks and flags are
set during a call only; afterwards the model is as it was.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deeplens_lightning.devices import on_device
from deeplens_lightning.model.cpu_kernels import faster, replaceable
from deeplens_lightning.model.hook_points import HookPoint
from deeplens_lightning.model.rope import length_scaled, original_frequencies
from deeplens_lightning.model.switching import SwitchedAttention
from deeplens_lightning.model.tracing import first_input, first_output
from deeplens_lightning.model.wrappers import uncompiled

_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_CHOOSING = threading.Lock()


def lock_of(base: nn.Module) -> threading.RLock:
    """The lock of a base model: one for all that run it, which the thread that holds it may take again."""
    with _CHOOSING:
        return _LOCKS.setdefault(base, threading.RLock())


class _AllCaptured(BaseException):
    """Raised in the last hook to end the forward pass; `HookedForward` catches it."""


class HookedForward:
    """A forward pass that ends at the deepest hook point.

    Args:
        base: the base model.
        hook_points: from `resolve`, of the same model.
        fast_kernels: use the kernels of `cpu_kernels`; False where `torch.compile` chooses kernels.

    Attributes:
        base: the base model.
        hook_points: as given.
        vocabulary: rows of the embedding.
        lock: held during a forward pass; the same for every `HookedForward` of this base model.
    """

    def __init__(
        self, base: PreTrainedModel, hook_points: Sequence[HookPoint], *, fast_kernels: bool
    ) -> None:
        self.base = base
        self.hook_points = tuple(hook_points)
        self.vocabulary = int(cast(Tensor, base.get_input_embeddings().weight).shape[0])
        self.lock = lock_of(base)
        self._device = base.device
        self._accepts = set(inspect.signature(base.forward).parameters)
        self._ropes = length_scaled(base)
        self._attention = SwitchedAttention(base)
        with self.lock:  # another thread may run the model with replaced modules
            self._replaceable = replaceable(base) if fast_kernels else []

    def __call__(
        self, tokens: Tensor, position_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Activations `(B, T, d_in)` by hook point; see `FrozenModel.activations`.

        Args:
            tokens: int64 `(B, T)`.
            position_ids: int64 `(B, T)`.
            attention_mask: int64 or bool `(B, T)`.

        Raises:
            ValueError: a token id is beyond the embedding (checked for tokens on the CPU).
        """
        if tokens.device.type == "cpu" and tokens.numel() and int(tokens.max()) >= self.vocabulary:
            raise ValueError(
                f"token id {int(tokens.max())} is beyond the model's embedding of {self.vocabulary} rows; give the "
                "tokenizer that the model was trained with"
            )
        inputs = {"input_ids": tokens, "position_ids": position_ids, "attention_mask": attention_mask}
        given: dict[str, Any] = {
            key: on_device(x, self._device)
            for key, x in inputs.items()
            if x is not None and key in self._accepts
        }
        if "use_cache" in self._accepts:
            given["use_cache"] = False  # with a cache, transformers does not keep packed segments apart
        with self.lock, ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            for kind in {"cpu", self._device.type}:
                stack.enter_context(torch.autocast(kind, enabled=False))
            stack.enter_context(uncompiled(self.base))
            stack.enter_context(self._attention.kept(tokens.shape[1]))
            stack.enter_context(_evaluation_mode(self.base))
            stack.enter_context(faster(self._replaceable))
            for rope in self._ropes:
                stack.enter_context(original_frequencies(rope))
            captured = stack.enter_context(_capture(self.base, self.hook_points, tokens.shape))
            with suppress(_AllCaptured):
                self.base(**given)
        missing = [point.name for point in self.hook_points if point.name not in captured]
        if missing:
            raise RuntimeError(
                f"the forward pass did not reach {', '.join(missing)}: these modules did not run, or run inside a "
                "compiled function, which hooks cannot enter; give the model without torch.compile on its parts, "
                "or choose another hook point"
            )
        return {point.name: captured[point.name] for point in self.hook_points}


@contextmanager
def _capture(
    base: nn.Module, hook_points: Sequence[HookPoint], shape: Sequence[int]
) -> Iterator[dict[str, Tensor]]:
    """Hooks that fill the yielded dictionary, and end the forward pass when it is full.

    They do nothing in forward passes of other threads, which do not hold the lock of the model.
    """
    captured: dict[str, Tensor] = {}
    thread = threading.get_ident()

    def keep(point: HookPoint, x: Tensor | None) -> None:
        if threading.get_ident() != thread:
            return
        if x is None:
            raise TypeError(f"{point.name}: the module {point.module!r} received or returned no tensor")
        if x.ndim == 3:
            x = x[:, : shape[1]]  # BigBird pads its sequences to whole blocks
        x = (x * point.scale if point.scale != 1 else x).reshape(*shape, -1)
        full = len(captured | {point.name: x}) == len(hook_points)
        captured[point.name] = x if full else x.clone()  # later modules may add to it in place
        if full:
            raise _AllCaptured

    with ExitStack() as stack:
        for point in hook_points:
            module = base.get_submodule(point.module)
            if point.side == "in":
                handle = module.register_forward_pre_hook(
                    lambda _, args, kwargs, point=point: keep(point, first_input(args, kwargs)),
                    with_kwargs=True,
                )
            else:
                handle = module.register_forward_hook(
                    lambda _, __, output, point=point: keep(point, first_output(output))
                )
            stack.callback(handle.remove)
        yield captured


@contextmanager
def _evaluation_mode(base: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and restore the training flag of each at the end."""
    training = [module for module in base.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
