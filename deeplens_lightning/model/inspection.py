"""List the hook points of a model, and what reading some of them costs, without loading weights.

In: a model and a choice of hook points. Out: an `Inspection`, and tables of it for a terminal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from deeplens_lightning.model.hook_points import TRANSFORMER_LENS, HookPoint, resolve
from deeplens_lightning.model.layer_map import LAYER_KINDS, ModulePlace, final_norm, layer_places
from deeplens_lightning.model.pretrained import cut, load_config, max_positions
from deeplens_lightning.model.tracing import Trace, trace
from deeplens_lightning.model.wrappers import unwrapped

_DTYPES = {
    "float64": torch.float64, "double": torch.float64, "float32": torch.float32, "float": torch.float32,
    "float16": torch.float16, "half": torch.float16, "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2,
}  # fmt: skip
"""The dtypes that `from_pretrained` takes by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A kind of hook point in all layers where it is the same, or the reason why these layers have none.

    Attributes:
        name: canonical name, with `<i>` for the layer.
        transformer_lens: the TransformerLens name with the same meaning; empty if there is none.
        layers: layer numbers; empty for `final_norm`.
        module: path, with `<i>` for the layer and `:in` for an input; empty if the layers have no such hook point.
        d_in: width of a row; 0 if the layers have no such hook point.
        note: the multiplier of the residual stream if there is one, or the reason why there is no such hook point.
    """

    name: str
    transformer_lens: str
    layers: tuple[int, ...]
    module: str
    d_in: int
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """The hook points of a model, and the cost of the chosen ones.

    Attributes:
        model: name of the model.
        family: `model_type` of its configuration.
        depth: number of layers.
        layers: path of the list of layers.
        positions: the longest segment in tokens; None if there is no limit.
        offers: every kind of hook point.
        chosen: the chosen hook points.
        layers_loaded: number of layers that are loaded, from the first one on; the others are skipped.
        parameters: number of parameters of the base model.
        parameters_loaded: number of these that are loaded.
        dtype: dtype of the activations, e.g. "float32".
        bytes_per_row: bytes that one row takes in the buffer, over all chosen hook points.
    """

    model: str
    family: str
    depth: int
    layers: str
    positions: int | None
    offers: tuple[Offer, ...]
    chosen: tuple[HookPoint, ...]
    layers_loaded: int
    parameters: int
    parameters_loaded: int
    dtype: str
    bytes_per_row: int


def inspect_model(
    hf_model: str | nn.Module,
    layer: int | Sequence[int] | None = None,
    hook: str | Sequence[str] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Inspection:
    """List the hook points of a model and the cost of the chosen ones.

    Args:
        hf_model: hub id, folder, `.gguf` file, `demo:lm` or a loaded model.
        layer: one or more layers, for hooks that are kinds; negative ones count from the end.
        hook: one or more kinds or full names, as in `resolve`; None chooses no hook point.
        model_kwargs: keyword arguments for `from_pretrained`.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: a hook point does not exist, or the model is no language model.
    """
    if isinstance(hf_model, str):
        model = None
        config, name = load_config(hf_model, model_kwargs), hf_model
    else:
        model = unwrapped(hf_model)
        config, name = model.config, str(model.name_or_path)
    traced = trace(model or config)
    chosen = () if hook is None else resolve(model or config, layer, hook)
    short = trace(cut(config, [point.layer for point in chosen])) if chosen else traced
    dtype = _dtype(model, config, model_kwargs or {})
    return Inspection(
        model=name,
        family=traced.family,
        depth=traced.depth,
        layers=traced.layers,
        positions=max_positions(config),
        offers=tuple(_offers(traced)),
        chosen=chosen,
        layers_loaded=short.depth,
        parameters=_parameters(traced),
        parameters_loaded=_parameters(short),
        dtype=str(dtype).removeprefix("torch."),
        bytes_per_row=sum(point.d_in for point in chosen) * dtype.itemsize,
    )


def render(inspection: Inspection) -> Group:
    """Tables for a terminal, with names that can be copied into a configuration."""
    positions = f", up to {inspection.positions} tokens" if inspection.positions else ""
    path = f"{inspection.layers}.<i>."
    offers = Table(
        "kind",
        "TransformerLens",
        "module",
        "d_in",
        "layers",
        "note",
        title=f"{inspection.model} ({inspection.family}, {inspection.depth} layers{positions})",
        caption=f"write layers.<i>.<kind>, blocks.<i>.<TransformerLens>, {path}<module>, or kind and layer",
    )
    offers.columns[2].overflow = offers.columns[5].overflow = "fold"
    for offer in inspection.offers:
        offers.add_row(
            offer.name.removeprefix("layers.<i>."),
            offer.transformer_lens.removeprefix("blocks.<i>."),
            offer.module.removeprefix(path) or "-",
            str(offer.d_in or "-"),
            _ranges(offer.layers),
            offer.note,
        )
    if not inspection.chosen:
        return Group(offers)
    chosen = Table("chosen", "module", "d_in", title="chosen hook points and their cost")
    for point in inspection.chosen:
        chosen.add_row(point.name, point.module + (":in" if point.side == "in" else ""), str(point.d_in))
    share = inspection.parameters_loaded / inspection.parameters
    skipped = range(inspection.layers_loaded, inspection.depth)
    costs = Table.grid(padding=(0, 2))
    costs.add_row("layers skipped", _ranges(skipped) or "none")
    costs.add_row(
        "parameters loaded", f"{inspection.parameters_loaded:,} of {inspection.parameters:,} ({share:.0%})"
    )
    costs.add_row("buffer", f"{inspection.bytes_per_row:,} bytes per row ({inspection.dtype})")
    return Group(offers, chosen, costs)


def _offers(traced: Trace) -> Iterable[Offer]:
    lens = {kind: f"blocks.<i>.{end}" for end, kind in TRANSFORMER_LENS.items()}
    layers_places = [layer_places(traced, index) for index in range(traced.depth)]
    for kind in LAYER_KINDS:
        alike: dict[tuple[str, int, str], list[int]] = {}
        for index, places in enumerate(layers_places):
            here = _cells(places[kind], f"{traced.layers}.{index}", f"{traced.layers}.<i>")
            alike.setdefault(here, []).append(index)
        for (module, d_in, note), layers in alike.items():
            yield Offer(
                name=f"layers.<i>.{kind}",
                transformer_lens=lens.get(kind, "") if module else "",
                layers=tuple(layers),
                module=module,
                d_in=d_in,
                note=note,
            )
    module, d_in, note = _cells(final_norm(traced), "", "")
    end = "ln_final" if module else ""
    yield Offer(name="final_norm", transformer_lens=end, layers=(), module=module, d_in=d_in, note=note)


def _cells(place: ModulePlace | str, here: str, general: str) -> tuple[str, int, str]:
    """Module, width and note of an `Offer`, with `general` in place of the layer's own path `here`."""
    if isinstance(place, str):
        return "", 0, place.replace(here, general) if here else place
    module = general + place.module.removeprefix(here) + (":in" if place.side == "in" else "")
    return module, place.d_in, "" if place.scale == 1 else f"times {place.scale:g}"


def _dtype(
    model: PreTrainedModel | None, config: PretrainedConfig, model_kwargs: Mapping[str, Any]
) -> torch.dtype:
    """The dtype of the activations; "auto" is that of the model or its configuration."""
    given = model_kwargs.get("dtype") or model_kwargs.get("torch_dtype") or "auto"
    chosen = _DTYPES.get(given) if isinstance(given, str) else given
    own: Any = model.dtype if model else config.dtype
    dtype: torch.dtype = chosen or own or torch.float32
    return dtype


def _parameters(traced: Trace) -> int:
    return sum(parameter.numel() for parameter in traced.base.parameters())


def _ranges(numbers: Iterable[int]) -> str:
    """`0-3, 5` for 0, 1, 2, 3, 5."""
    ordered = list(numbers)
    starts = [*ordered[:1], *(b for a, b in pairwise(ordered) if b != a + 1)]
    ends = [*(a for a, b in pairwise(ordered) if b != a + 1), *ordered[-1:]]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
