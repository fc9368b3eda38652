"""Find the language model inside a wrapper such as those of `torch.compile` and PEFT.

In: a module. Out: the Hugging Face model in it, with the adapters that PEFT put into its layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch._dynamo import OptimizedModule
from transformers import PreTrainedModel


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model inside a wrapper, or the model itself; the wrapper is left as it is.

    Args:
        model: a Hugging Face model, or a module that holds one: the result of `torch.compile`, a `PeftModel`, ...

    Raises:
        TypeError: there is no Hugging Face model in it.
        ValueError: the wrapper has weights of its own around the model, such as a learned prompt.
    """
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None:
        raise TypeError(
            f"hf_model is a {type(model).__name__} with no Hugging Face model in it; give a hub id, a folder, or a "
            "transformers PreTrainedModel, which may be wrapped by torch.compile or PEFT"
        )
    own = {id(parameter) for parameter in inner.parameters()}
    outside = [name for name, parameter in model.named_parameters() if id(parameter) not in own]
    if outside:
        raise ValueError(
            f"hf_model is a {type(model).__name__} with weights around the language model, such as {outside[0]!r}, "
            "which hook points cannot include; give the language model alone, or adapters inside its layers (LoRA)"
        )
    return inner


@contextmanager
def uncompiled(base: nn.Module) -> Iterator[None]:
    """Run a model without the compiled calls of its modules: hooks inside a compiled call do not run.

    That holds for modules compiled in place (`module.compile()`) and for parts that `torch.compile` wraps. At the end
    of the context the model is as before.
    """
    modules = list(base.modules())
    calls = [(module, module._compiled_call_impl) for module in modules if module._compiled_call_impl]
    parts = [
        (module, name, child)
        for module in modules
        for name, child in module.named_children()
        if isinstance(child, OptimizedModule)
    ]
    for module, _ in calls:
        module._compiled_call_impl = None
    for module, name, child in parts:
        setattr(module, name, child._orig_mod)
    try:
        yield
    finally:
        for module, name, child in parts:
            setattr(module, name, child)
        for module, call in calls:
            module._compiled_call_impl = call
