"""Resolve the name of a hook point to a place in a model.

In: a configuration or a loaded model, and one or more names: a kind with a layer, a canonical name, a TransformerLens
name or a module path. Out: `HookPoint`s with their widths. No weights are loaded.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PretrainedConfig

from deeplens_lightning.model.layer_map import LAYER_KINDS, ModulePlace, final_norm, layer_places
from deeplens_lightning.model.tracing import Call, Trace, trace

KINDS = (*LAYER_KINDS, "final_norm")
"""Every kind of hook point. `layers.<i>.<kind>` is its canonical name; `final_norm` has no layer."""

TRANSFORMER_LENS = {
    "mlp.hook_post": "mlp_post",
    "hook_mlp_out": "mlp_out",
    "hook_attn_out": "attn_out",
    "attn.hook_z": "attn_z",
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
}
"""TransformerLens names after `blocks.<i>.`, and the kinds with the same meaning; `ln_final` is `final_norm`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HookPoint:
    """A place in a model where activations are read.

    Attributes:
        name: canonical name: `layers.6.mlp_out`, `final_norm`, or the module path (with `:in` for an input).
        module: path of the module inside the base model.
        side: "in" for the module's first input, "out" for its output.
        layer: the deepest decoder layer that has to run; None if all layers have to run.
        d_in: width of a row.
        scale: factor by which the value is multiplied before it is added to the residual stream (not 1 in Granite
            and MiniCPM, for example). The activations include it.
    """

    name: str
    module: str
    side: Literal["in", "out"]
    layer: int | None
    d_in: int
    scale: float = 1.0


def resolve(
    model: PretrainedConfig | nn.Module, layer: int | Sequence[int] | None, hook: str | Sequence[str]
) -> tuple[HookPoint, ...]:
    """The hook points with the given names, in a model or in the model of a configuration.

    Args:
        model: the configuration of a model, or the model.
        layer: one or more layers, for those hooks that are kinds; negative ones count from the end.
        hook: one or more kinds (each is taken at each layer), or full names, which need no layer: canonical names,
            TransformerLens names, module paths.

    Returns:
        One hook point per kind and layer, and one per full name, in the order given.

    Raises:
        ValueError: a name is unknown, the model has no such hook point, a layer is out of range, or the same hook
            point is named twice.
    """
    traced = trace(model)
    layers = [layer] if isinstance(layer, int) else list(layer or [])
    hooks = [hook] if isinstance(hook, str) else list(hook)
    points = [_Resolver(traced).point(name) for each in hooks for name in _full_names(traced, layers, each)]
    names = [point.name for point in points]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"hook points are named twice: {', '.join(twice)}; name each one once")
    if not points:
        raise ValueError(f"no hook point is named; give hook= one of {', '.join(KINDS)}")
    return tuple(points)


def _full_names(traced: Trace, layers: Sequence[int], hook: str) -> Iterator[str]:
    """The full names that a hook stands for: a kind at each layer, any other name alone."""
    if hook not in LAYER_KINDS:
        yield hook
        return
    if not layers:
        raise ValueError(f"hook={hook!r} needs a layer: give layer= a number from 0 to {traced.depth - 1}")
    for index in layers:
        yield f"layers.{index}.{hook}"


class _Resolver:
    """Resolves full names in one traced model."""

    def __init__(self, traced: Trace) -> None:
        self.trace = traced
        self.family = traced.family

    def point(self, name: str) -> HookPoint:
        """The hook point with this full name."""
        if name in ("final_norm", "ln_final", "ln_final.hook_out"):
            return self._of_kind(None, "final_norm")
        written = re.fullmatch(r"(layers|blocks)\.(-?\d+)\.(.+)", name)
        if written:
            style, number, rest = written.groups()
            kind = TRANSFORMER_LENS.get(rest) if style == "blocks" else rest
            if kind in LAYER_KINDS:
                return self._of_kind(int(number), kind)
        return self._of_module(name)

    def _of_kind(self, index: int | None, kind: str) -> HookPoint:
        places: dict[str, ModulePlace | str] = {"final_norm": final_norm(self.trace)}
        owner = self.family
        if index is not None:
            depth = self.trace.depth
            if not -depth <= index < depth:
                raise ValueError(
                    f"layer {index} is out of range: this {self.family} model has layers 0 to {depth - 1} "
                    f"(-1 to -{depth} count from the end)"
                )
            index %= depth
            places, owner = layer_places(self.trace, index), f"layer {index} of {self.family}"
        place = places[kind]
        if isinstance(place, str):
            offered = [key for key, other in places.items() if isinstance(other, ModulePlace)]
            raise ValueError(
                f"{owner} has no {kind}: {place}. It offers {', '.join(offered) or 'no other kind'}"
            )
        return HookPoint(
            name=kind if index is None else f"layers.{index}.{kind}",
            module=place.module,
            side=place.side,
            layer=index,
            d_in=place.d_in,
            scale=place.scale,
        )

    def _of_module(self, name: str) -> HookPoint:
        written, _, end = name.partition(":")
        path = self._path(written)
        if path is None or end not in ("", "in", "out"):
            raise ValueError(self._unknown(name))
        calls = self.trace.calls_of(path)
        if len(calls) != 1:
            often = f"runs {len(calls)} times in one forward pass" if calls else "is never called by itself"
            raise ValueError(
                f"hook={name!r}: the module {often}, so it does not have one row per token; name another module"
            )
        (call,) = calls
        side: Literal["in", "out"] = "in" if end == "in" else "out"
        d_in = call.d_in if side == "in" else call.d_out
        if side == "in" and call.input_form is None:
            raise ValueError(
                f"hook={name!r}: the module takes no positional tensor; read its output, {written!r}"
            )
        if not d_in:
            raise ValueError(
                f"hook={name!r}: the module's {side}put is no floating-point tensor with one row per token, "
                "(batch, sequence, width); name another module"
            )
        canonical = f"{path}:in" if side == "in" else path
        return HookPoint(name=canonical, module=path, side=side, layer=self._deepest(path, call), d_in=d_in)

    def _path(self, written: str) -> str | None:
        """The path inside the base model; a path in the whole model (`transformer.h.3`) is accepted too."""
        base = self.trace.base
        known = {path for path, _ in base.named_modules() if path}
        prefixes = {base.base_model_prefix, "model", "encoder"}
        path = written
        while path not in known:
            head, _, path = path.partition(".")
            if head not in prefixes or not path:
                return None
        return path

    def _deepest(self, path: str, call: Call) -> int | None:
        """The deepest layer that has to run before a module: its own, 0 before the layers, None after them."""
        inside = re.match(rf"{re.escape(self.trace.layers)}\.(\d+)(\.|$)", path)
        if inside:
            return int(inside[1])
        first = self.trace.calls_of(f"{self.trace.layers}.0")
        return 0 if first and call.end < first[0].start else None

    def _unknown(self, name: str) -> str:
        """The message for an unknown name, with the nearest known ones."""
        base, layers, depth = self.trace.base, self.trace.layers, self.trace.depth
        if re.match(r"(model\.)?decoder\.", name) and layers.partition(".")[0] != "decoder":
            return f"hook={name!r}: of {self.family} models only the encoder is read; name a module in {layers!r}"
        index = next((int(part) for part in name.split(".") if part.isdigit() and int(part) < depth), 0)
        candidates = [
            *KINDS,
            *(f"layers.{index}.{kind}" for kind in LAYER_KINDS),
            *(f"blocks.{index}.{end}" for end in TRANSFORMER_LENS),
            *(path for path, _ in base.named_modules() if path),
        ]
        near = difflib.get_close_matches(name, candidates, n=4, cutoff=0.4)
        return (
            f"hook={name!r} names nothing in this {self.family} model; nearest: {', '.join(near) or 'none'}. "
            f"Kinds: {', '.join(KINDS)}; a module path may end in ':in'"
        )
