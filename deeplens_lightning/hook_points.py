"""Names of places in a model, turned into the places themselves.

In: a config (or a loaded model) and what the user wrote: a kind with a layer, a canonical name, a
TransformerLens name or a module path. Out: `HookPoint`s, whose width is known before any weight is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

KINDS = (
    "mlp_in",
    "mlp_act",
    "mlp_post",
    "mlp_out",
    "attn_out",
    "attn_z",
    "resid_pre",
    "resid_mid",
    "resid_post",
    "final_norm",
)
"""Every kind of hook point, as named in `layers.<i>.<kind>`; `final_norm` stands alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HookPoint:
    """A place in a model where activations are read.

    Attributes:
        name: canonical: `layers.6.mlp_out`, `final_norm`, or the module path (with `:in` for an input).
        module: path inside the base model.
        side: whether the module's first input is read or its output.
        layer: the deepest decoder layer that has to run; None when all of them do.
        d_in: width of a row.
        scale: what the module's output is multiplied by before the residual stream receives it.
    """

    name: str
    module: str
    side: Literal["in", "out"]
    layer: int | None
    d_in: int
    scale: float = 1.0


def resolve(
    model: PretrainedConfig | PreTrainedModel, layer: int | Sequence[int] | None, hook: str | Sequence[str]
) -> tuple[HookPoint, ...]:
    """The hook points that a user's words name, in the user's order."""
    config = model if isinstance(model, PretrainedConfig) else model.config
    with torch.device("meta"):
        base = AutoModel.from_config(config)
    layers = [layer] if isinstance(layer, int) else list(layer or [])
    hooks = [hook] if isinstance(hook, str) else list(hook)
    points = [
        _point(base, index, kind) for kind in hooks for index in (layers if kind in KINDS[:-1] else [None])
    ]
    return tuple(points)


def _point(base: nn.Module, index: int | None, name: str) -> HookPoint:
    path = next(p for p in ("h", "layers") if hasattr(base, p))
    depth = len(base.get_submodule(path))  # type: ignore[arg-type]
    width = base.config.hidden_size  # type: ignore[union-attr]
    if name == "final_norm":
        norm = next(p for p in ("ln_f", "norm", "final_layer_norm") if hasattr(base, p))
        return HookPoint(name=name, module=norm, side="out", layer=None, d_in=width)
    if name.startswith("layers."):
        _, number, name = name.split(".")
        index = int(number)
    if index is None or not -depth <= index < depth:
        raise ValueError(f"layer={index} is out of range: the model has layers 0 to {depth - 1}")
    index %= depth
    block = f"{path}.{index}"
    children = dict(base.get_submodule(block).named_children())
    mlp, attn = "mlp", next(n for n in ("attn", "attention", "self_attn") if n in children)
    inside = dict(children[mlp].named_children())
    act = next(n for n in ("act", "act_fn") if n in inside)
    down = next(n for n in ("c_proj", "dense_4h_to_h", "down_proj") if n in inside)
    z = next(n for n in ("c_proj", "dense", "o_proj") if hasattr(children[attn], n))
    neurons = base.get_submodule(f"{block}.mlp.{down}")
    d_mlp = neurons.weight.shape[0] if type(neurons).__name__ == "Conv1D" else neurons.in_features
    o_proj = base.get_submodule(f"{block}.{attn}.{z}")
    d_z = o_proj.weight.shape[0] if type(o_proj).__name__ == "Conv1D" else o_proj.in_features
    sandwich = "pre_feedforward_layernorm" in children
    mid = next(n for n in ("pre_feedforward_layernorm", "ln_2", "post_attention_layernorm") if n in children)
    table: dict[str, tuple[str, Literal["in", "out"], int]] = {
        "mlp_in": (f"{block}.{mlp}", "in", width),
        "mlp_act": (f"{block}.{mlp}.{act}", "out", d_mlp),
        "mlp_post": (f"{block}.{mlp}.{down}", "in", d_mlp),
        "mlp_out": (f"{block}.post_feedforward_layernorm" if sandwich else f"{block}.{mlp}", "out", width),
        "attn_out": (f"{block}.post_attention_layernorm" if sandwich else f"{block}.{attn}", "out", width),
        "attn_z": (f"{block}.{attn}.{z}", "in", d_z),
        "resid_pre": (block, "in", width),
        "resid_mid": (f"{block}.{mid}", "in", width),
        "resid_post": (block, "out", width),
    }
    if name not in table:
        raise ValueError(f"hook={name!r} is unknown; choose one of {', '.join(KINDS)}")
    module, side, d_in = table[name]
    return HookPoint(name=f"layers.{index}.{name}", module=module, side=side, layer=index, d_in=d_in)
