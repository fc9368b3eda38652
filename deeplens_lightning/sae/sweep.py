"""The SAEs of a sweep: a name for each, and its arguments."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from itertools import product
from typing import Any

from deeplens_lightning.sae.dictionary import Dictionary

_SIGNATURE = inspect.signature(Dictionary)
_ARGUMENTS = [name for name in _SIGNATURE.parameters if name != "d_in"]


def sweep_arguments(
    sweep: Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]], shared: Mapping[str, Any] | None = None
) -> dict[str, dict[str, Any]]:
    """The arguments of each SAE of a sweep, by its name, such as "k=32,seed=1".

    Args:
        sweep: values by argument, of which all combinations are taken; or the arguments of each SAE.
        shared: arguments of all SAEs.

    Raises:
        ValueError: `SparseAutoencoder` has no such argument, two SAEs have the same settings, or there is none.
    """
    if isinstance(sweep, Mapping):
        chosen = [dict(zip(sweep, values, strict=True)) for values in product(*sweep.values())]
    else:
        chosen = [dict(each) for each in sweep]
    shared = shared or {}
    _check_arguments({name for each in (*chosen, shared) for name in each})
    named = {_name(each): {**shared, **each} for each in chosen}
    if len(named) < len(chosen) or not chosen:
        raise ValueError(f"sweep={sweep!r} must give at least one SAE, and different SAEs")
    return named


def with_defaults(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a dictionary, completed with the defaults of all others."""
    bound = _SIGNATURE.bind_partial(**arguments)
    bound.apply_defaults()
    return dict(bound.arguments)


def unknown_name(name: object, names: Iterable[str]) -> str:
    """A sentence for the name of an SAE that a grid does not have, with the nearest name and all others."""
    known = list(names)
    near = get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"the grid has no SAE {name!r}: {hint}its SAEs are {', '.join(map(repr, known))}"


def _check_arguments(names: Iterable[str]) -> None:
    for name in names:
        if name not in _ARGUMENTS:
            near = get_close_matches(name, _ARGUMENTS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"its arguments are {', '.join(_ARGUMENTS)}"
            raise ValueError(f"SparseAutoencoder has no argument {name!r}; {hint}")


def _name(settings: Mapping[str, Any]) -> str:
    return ",".join(f"{name}={_word(value)}" for name, value in settings.items())


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        return "+".join(_word(v) for v in value.values())
    return "+".join(map(_word, value)) if isinstance(value, list | tuple) else str(value)
