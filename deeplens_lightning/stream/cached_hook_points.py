"""Name the hook points of a cache from `layer` and `hook`, and compare them with the model that they are said to be of.

In: settings, and the shards that were found. Out: canonical names, or an error before any row is read.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence

from deeplens_lightning.model.hook_points import TRANSFORMER_LENS, resolve
from deeplens_lightning.model.layer_map import LAYER_KINDS
from deeplens_lightning.model.pretrained import load_config
from deeplens_lightning.model.wrappers import unwrapped
from deeplens_lightning.shards.catalog import Catalog
from deeplens_lightning.shards.errors import ShardError
from deeplens_lightning.shards.format import UNNAMED
from deeplens_lightning.stream.settings import DataSettings

log = logging.getLogger(__name__)


def bare_hook(given: DataSettings) -> str | None:
    """The canonical name of the rows in bare tensor files, from `layer` and `hook`; None to use the file names."""
    names = [given.hook] if isinstance(given.hook, str) else list(given.hook or [])
    layers = [given.layer] if isinstance(given.layer, int) else list(given.layer or [])
    if len(names) != 1:
        return None
    name = canonical(names[0])
    if name not in LAYER_KINDS:
        return name
    return f"layers.{layers[0]}.{name}" if len(layers) == 1 and layers[0] >= 0 else None


def check_bare_names(catalog: Catalog, given: DataSettings) -> None:
    """Check that `layer` and `hook`, where they are given, name the rows of bare tensors or agree with the file names.

    Raises:
        ShardError: they do neither.
    """
    unused = bare_hook(given) is None and not (given.layer is None and given.hook is None)
    if not unused or all(shard.storage != "bare" for shard in catalog.shards):
        return
    if UNNAMED in catalog.hook_points:
        raise ShardError(
            f"layer={given.layer!r}, hook={given.hook!r} does not name the rows of bare tensors, which are of one hook "
            "point: give one layer, counted from 0, and one hook, such as layer=3, hook='mlp_act', or neither if it is "
            "unknown"
        )
    chosen(list(catalog.hook_points), given.layer, given.hook)


def check_model(widths: Mapping[str, int], given: DataSettings) -> None:
    """Check by their widths that rows may come from the model that `hf_model` names.

    Only the model's configuration is read, and only if it is on this machine; else a warning is logged.

    Args:
        widths: width of the rows by canonical name of the hook point.
        given: the settings of the data module.

    Raises:
        ShardError: the model has another width at a hook point.
        ValueError: the model has no such hook point.
    """
    named = {name: d_in for name, d_in in widths.items() if name != UNNAMED}
    if given.hf_model is None or not named:
        return
    if isinstance(given.hf_model, str):
        words = repr(given.hf_model)
        try:
            kwargs = {**(given.model_options.kwargs or {}), "local_files_only": True}
            points = resolve(load_config(given.hf_model, kwargs), None, list(named))
        except FileNotFoundError:
            log.warning(
                "hf_model=%s is not on this machine: the widths of its rows are not compared with those of the shards",
                words,
            )
            return
    else:
        words = type(unwrapped(given.hf_model)).__name__
        points = resolve(unwrapped(given.hf_model), None, list(named))
    for point, (name, d_in) in zip(points, named.items(), strict=True):
        if point.d_in != d_in:
            raise ShardError(
                f"the rows of {name} in the shards are {d_in} wide, and those of hf_model={words} are {point.d_in} wide: "
                "give the hf_model, layer and hook that the rows were computed with, or leave out what is unknown"
            )


def canonical(hook: str) -> str:
    """Translate TransformerLens's name of a hook point to the canonical one; other names are returned unchanged."""
    if hook in ("ln_final", "ln_final.hook_out"):
        return "final_norm"
    written = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)
    if written and written[2] in TRANSFORMER_LENS:
        return f"layers.{written[1]}.{TRANSFORMER_LENS[written[2]]}"
    return hook


def chosen(
    names: Sequence[str], layer: int | Sequence[int] | None, hook: str | Sequence[str] | None
) -> tuple[str, ...]:
    """Find the hook points of a cache that match `layer` and `hook`.

    Args:
        names: canonical names of the hook points in the cache.
        layer: one layer number or several; None for all layers.
        hook: one kind or full name or several; None for all kinds.

    Returns:
        Canonical names, in the order of `layer` and `hook`.

    Raises:
        ShardError: a layer or hook matches nothing in the cache; the message lists what the cache has.
    """
    layers = [layer] if isinstance(layer, int) else list(layer or [])
    hooks = [hook] if isinstance(hook, str) else list(hook or [])
    found: list[str] = []
    places: list[int | None] = [*layers] or [None]
    for number in places:
        for each in map(canonical, hooks or [""]):
            place = r"\d+" if number is None else str(number)
            kind = re.escape(each) if each else r"\w+"
            pattern = rf"layers\.{place}\.{kind}" if not each or each in LAYER_KINDS else kind
            matches = [name for name in names if re.fullmatch(pattern, name)]
            if not matches:
                asked = f"layer={layer!r}, hook={hook!r}"
                raise ShardError(
                    f"{asked} is not in the shards, which hold {', '.join(names)}; choose layer= and hook= among those, "
                    "or extract again"
                )
            found += [name for name in matches if name not in found]
    return tuple(found)
