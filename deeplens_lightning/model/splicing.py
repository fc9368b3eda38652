"""Replace the activations at a hook point during a forward pass, for ablation, steering or reconstruction.

In: a Hugging Face model, a hook point and a function. Out: a context in which the rest of the model continues from the
result of the function. When the context ends, the hook is removed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deeplens_lightning.model.hook_points import HookPoint, resolve
from deeplens_lightning.model.tracing import base_of
from deeplens_lightning.model.wrappers import uncompiled


@contextmanager
def spliced(
    model: PreTrainedModel, hook_point: HookPoint | str, fn: Callable[[Tensor], Tensor]
) -> Iterator[PreTrainedModel]:
    """Replace activations `x` at a hook point by `fn(x)` until the context ends.

    Args:
        model: with or without its head. Neither its weights nor its train/eval flags are changed. Modules that were
            compiled in place run without their compiled calls. Other threads, such as a data module's that computes
            rows with this model, must not run it meanwhile: hold `data.model.exclusive()` around the context.
        hook_point: from `resolve`, or its full name, e.g. `layers.6.mlp_out`.
        fn: takes the activations `(..., d_in)` that the hook point reads, and returns their replacement of the same
            shape, in any float dtype and on any device. Entries that it returns unchanged stay bit-identical in the
            model.

    Yields:
        The model.

    Raises:
        ValueError: the hook point does not exist, or, when the model runs, `fn` returns another shape.
    """
    point = hook_point if isinstance(hook_point, HookPoint) else resolve(model, None, hook_point)[0]
    base = base_of(model)
    module = base.get_submodule(point.module)
    # The residual stream between attention and MLP has two readers, the MLP's norm and the sum after the MLP. Only
    # the first one is a module with a hook, so the tensor is changed in place.
    in_place = point.name.endswith(".resid_mid")

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        new = _replaced(x, point, fn)
        if in_place:
            x.copy_(new)
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    def after(_: Any, __: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return _replaced(output, point, fn)
        return (_replaced(output[0], point, fn), *output[1:])

    handle = (
        module.register_forward_pre_hook(before, with_kwargs=True)
        if point.side == "in"
        else module.register_forward_hook(after)
    )
    try:
        with uncompiled(base):
            yield model
    finally:
        handle.remove()


def _replaced(x: Tensor, point: HookPoint, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """The value to put in place of `x`, so that the hook point, which reads `x * scale`, reads `fn` of that."""
    read = x * point.scale if point.scale != 1 else x
    new = fn(read).to(read.device, read.dtype)
    if new.shape != read.shape:
        raise ValueError(
            f"the function spliced in at {point.name} must keep the shape {tuple(read.shape)}, "
            f"but it returned {tuple(new.shape)}"
        )
    # Multiplying and dividing by the scale rounds, so entries that `fn` left unchanged are taken from `x`.
    return torch.where(new == read, x, new / point.scale) if point.scale != 1 else new
