"""RoPE whose frequencies depend on the length of the sequence ("dynamic" and "longrope" scaling).

In: a configuration, or the rotary modules of a model. Out: whether there is such scaling, and a context in which the
modules start from their original frequencies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from transformers import PretrainedConfig

from deeplens_lightning.model.hf_config import setting


@runtime_checkable
class _Rotary(Protocol):
    """A rotary embedding of transformers, which has a class of its own in each architecture."""

    rope_type: str | Mapping[str, str]
    """Kind of scaling; by layer type where layers differ."""


def has_dynamic_rope(config: PretrainedConfig) -> bool:
    """Whether RoPE is scaled dynamically, so that sequences may exceed `max_position_embeddings`."""
    return any(rope.get("rope_type", "default") == "dynamic" for rope in _rope_parameters(config))


def length_scaled(base: nn.Module) -> list[nn.Module]:
    """The rotary modules of a model whose frequencies depend on the sequence length."""
    return [module for module in base.modules() if isinstance(module, _Rotary) and _scales(module.rope_type)]


@contextmanager
def original_frequencies(rope: nn.Module) -> Iterator[None]:
    """Give a rotary module its original frequencies, and restore its present state at the end of the context.

    With dynamic scaling the module stores the longest sequence so far; without this context, rows would depend on
    what the model ran before.
    """
    # Which attributes a rotary module changes in its forward pass differs between architectures and versions of
    # transformers, so all of them are saved; `vars` is the only way to list them.
    state = vars(rope)
    attributes = {key: value for key, value in state.items() if not isinstance(value, dict)}
    buffers = {key: value.clone() for key, value in rope._buffers.items() if value is not None}
    present: dict[str, Any] = {**rope._buffers, **attributes}
    for key in buffers:
        original = present.get(key.replace("inv_freq", "original_inv_freq"))
        if "original" not in key and isinstance(original, Tensor):
            rope._buffers[key] = original.to(buffers[key].device, copy=True)
    for key in attributes:
        if key.endswith("max_seq_len_cached"):
            setattr(rope, key, rope.original_max_seq_len)
    try:
        yield
    finally:
        for key, value in list(state.items()):
            if key not in attributes and not isinstance(value, dict):
                delattr(rope, key)
        state.update(attributes)
        rope._buffers.update(buffers)


def _scales(rope_type: str | Mapping[str, str]) -> bool:
    names = rope_type.values() if isinstance(rope_type, Mapping) else [rope_type]
    return any("dynamic" in str(name) or name == "longrope" for name in names)


def _rope_parameters(config: PretrainedConfig) -> list[Mapping[str, Any]]:
    """The RoPE parameters of a configuration; one entry for each layer type where layers differ."""
    rope = setting(config.get_text_config(), "rope_parameters") or {}
    nested = [value for value in rope.values() if isinstance(value, Mapping)]
    return nested or [rope]
