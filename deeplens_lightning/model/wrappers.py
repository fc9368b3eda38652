"""Find the language model inside a wrapper such as those of `torch.compile` and PEFT.

In: a module. Out: the Hugging Face model in it, with the adapters that PEFT put into its layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
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
    """Run modules that were compiled in place (`module.compile()`) without their compiled calls.

    Hooks inside a compiled call do not run. At the end of the context the compiled calls are back.
    """
    compiled = [
        (module, module._compiled_call_impl) for module in base.modules() if module._compiled_call_impl
    ]
    for module, _ in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled:
            module._compiled_call_impl = call
