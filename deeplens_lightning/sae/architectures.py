"""Build the activation function of an architecture from its name and settings."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from deeplens_lightning.sae.activations import Activation, BatchTopK, Gated, JumpReLU, ReLU, TopK

ACTIVATIONS: dict[str, type[Activation]] = {
    "relu": ReLU,
    "topk": TopK,
    "batch_topk": BatchTopK,
    "jumprelu": JumpReLU,
    "gated": Gated,
}
MATRYOSHKA: dict[str, Any] = {"name": "batch_topk", "prefixes": [1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0]}
_NAMES = (*ACTIVATIONS, "matryoshka")


def architecture_spec(architecture: str | Mapping[str, Any]) -> dict[str, Any]:
    """Write an architecture as `{"name": ..., **settings}`; "matryoshka" becomes "batch_topk" with prefixes.

    Args:
        architecture: a name, or a mapping with `name` and settings.

    Raises:
        ValueError: the name is unknown or missing.
    """
    spec = {"name": architecture} if isinstance(architecture, str) else dict(architecture)
    if "name" not in spec:
        example = {"name": "topk", **spec}
        raise ValueError(
            f"architecture={spec} has no name: give one, as in {example}; the names are {', '.join(_NAMES)}"
        )
    name = str(spec["name"]).lower().replace("-", "_").replace("batchtopk", "batch_topk")
    if name == "matryoshka":
        return {**MATRYOSHKA, **spec, "name": "batch_topk"}
    if name not in ACTIVATIONS:
        near = get_close_matches(name, _NAMES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(_NAMES)}"
        raise ValueError(f"architecture {name!r} is unknown; {hint}")
    return {**spec, "name": name}


def make_activation(spec: Mapping[str, Any], *, d_sae: int, d_out: int, k: int) -> Activation:
    """Build an activation.

    Args:
        spec: the architecture, as `architecture_spec` gives it; `unit_norm` in it overrides the class attribute.
        d_sae: number of latents.
        d_out: width of the rows that are reconstructed.
        k: number of active latents per row, for the top-k family.

    Raises:
        ValueError: a setting that this activation does not have.
    """
    kind = ACTIVATIONS[spec["name"]]
    settings = {name: value for name, value in spec.items() if name != "name"}
    unit_norm = settings.pop("unit_norm", kind.unit_norm)
    known = [name for name in inspect.signature(kind).parameters if name not in ("d_sae", "d_in", "k")]
    for name in settings:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"its settings are {', '.join(known)}"
            raise ValueError(f"architecture {spec['name']!r} has no setting {name!r}; {hint}")
    if issubclass(kind, TopK):
        settings |= {"k": k, "d_in": d_out, "prefixes": tuple(settings.get("prefixes", ()))}
    activation = kind(d_sae, **settings)
    activation.unit_norm = bool(unit_norm)
    return activation
