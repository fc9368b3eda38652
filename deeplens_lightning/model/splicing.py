"""Replace what a model computes at a hook point while it runs on: ablation, steering, reconstruction.

In: any Hugging Face model, a hook point, a function of its activations. While the context lasts, the
rest of the model goes on from what the function returns; afterwards no hook is left.
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


@contextmanager
def spliced(
    model: PreTrainedModel, hook_point: HookPoint | str, fn: Callable[[Tensor], Tensor]
) -> Iterator[PreTrainedModel]:
    """Within the context, `model` continues from `fn(activations)` at the hook point.

    Args:
        model: with or without its head; neither weights nor train/eval flag are changed.
        hook_point: from `resolve`, or its full name, e.g. `layers.6.mlp_out`.
        fn: from activations `(..., d_in)`, exactly as `resolve`'s hook point is read, to their replacement
            of the same shape; any float dtype and device. Where it returns what it was given, the model
            computes bit for bit what it would have.

    Yields:
        The model.

    Raises:
        ValueError: the hook point does not exist, or `fn` returns another shape (when the model is run).
    """
    point = hook_point if isinstance(hook_point, HookPoint) else resolve(model, None, hook_point)[0]
    module = base_of(model).get_submodule(point.module)
    # The stream between the halves of a layer is read twice, by the MLP's norm and by the sum behind the
    # MLP, but only the first reader is a module: the tensor itself has to change.
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
        yield model
    finally:
        handle.remove()


def _replaced(x: Tensor, point: HookPoint, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """What the module should have given, so that the hook point reads `fn` of what it read."""
    read = x * point.scale if point.scale != 1 else x
    new = fn(read).to(read.device, read.dtype)
    if new.shape != read.shape:
        raise ValueError(
            f"the function spliced in at {point.name} must keep the shape {tuple(read.shape)}, "
            f"but returned {tuple(new.shape)}"
        )
    # Dividing what was multiplied would round; what was left alone stays exactly as it was.
    return torch.where(new == read, x, new / point.scale) if point.scale != 1 else new
