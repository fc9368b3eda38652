"""Choose the model and the hook points that `ExtractSingleSample` reads in a Trainer.

In: what the data module serves and what the user named. Out: a `TextActivations`, and hook points of its model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from deeplens_lightning.activation_data import ActivationData
from deeplens_lightning.callbacks.sae_view import SaeView, choose_hook
from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.model.hook_points import HookPoint
from deeplens_lightning.model.single_text import TextActivations


def reader_for(
    data: ActivationData,
    *,
    hf_model: str | nn.Module | None,
    load_own: bool,
    max_length: int,
    device: str,
    tokenizer: str | PreTrainedTokenizerBase | None,
    model_kwargs: Mapping[str, Any] | None,
) -> TextActivations:
    """Make the reader of single texts: through the data module's model, or through one that it loads when needed.

    Args:
        data: the data module.
        hf_model: a model to read instead of the data module's, or its name.
        load_own: where the data module has no model, load the one that its rows came from.
        max_length: longer texts are cut to this number of tokens.
        device: device of a model that the reader loads.
        tokenizer: default the data module's.
        model_kwargs: arguments for `from_pretrained`; default the data module's.

    Raises:
        ValueError: there is no model to read.
    """
    frozen: FrozenModel | None = data.model
    source = data.hf_model
    if hf_model is not None or (frozen is None and load_own):
        source = hf_model if hf_model is not None else source
        frozen = None
    elif frozen is None:
        raise ValueError(
            "ExtractSingleSample has no model to read: the data module has none (it serves cached shards, or is "
            'of another class). Name one as hf_model="...", or pass load_own=True to load the one that the shards '
            "came from"
        )
    if source is None:
        raise ValueError('the data module does not say which model its rows came from; pass hf_model="..."')
    return TextActivations(
        source,
        max_length=max_length,
        device=device,
        tokenizer=tokenizer or data.tokenizer,
        model_kwargs=model_kwargs or data.model_kwargs,
        frozen=frozen,
        prepend_bos=data.prepend_bos,
    )


def named_hook(
    reader: TextActivations, names: Sequence[str], layer: int | None, hook: str | None
) -> str | None:
    """Canonical name of the hook point that the user named; None where the user named neither layer nor hook.

    Args:
        reader: reader of the model.
        names: canonical names of the hook points that batches hold; with a layer alone, the kind is theirs.
        layer: the layer given, if any.
        hook: the hook given, if any.

    Raises:
        ValueError: a layer without a hook, and batches hold several kinds of hook points; or no such hook point.
    """
    if layer is None and hook is None:
        return None
    kinds = {name.rpartition(".")[2] for name in names} or {"mlp_act"}
    if hook is None and len(kinds) > 1:
        raise ValueError(f"layer={layer} names several of {', '.join(names)}; name one as hook=")
    return reader.point(layer, hook or kinds.pop()).name


def points_to_read(
    reader: TextActivations, names: Sequence[str], named: str | None, sae: SaeView | None
) -> tuple[HookPoint, ...]:
    """Hook points that the SAE reads and writes; without an SAE, the one that was named or the only one.

    Args:
        reader: reader of the model.
        names: canonical names of the hook points that batches hold.
        named: the hook point that the user named, from `named_hook`.
        sae: the SAE that trains, if there is one.

    Raises:
        ValueError: the SAE does not read the named hook point, or the hook point of the rows is unknown.
    """
    wanted = (choose_hook(names, named),) if sae is None else sae.hooks
    if named is not None and named not in wanted:
        raise ValueError(
            f"the SAE in training reads {', '.join(wanted)}, not {named}; leave layer and hook out"
        )
    if "" in wanted:
        raise ValueError("the data module does not say which hook point its rows come from; name it as hook=")
    return tuple(reader.point(None, name) for name in wanted)
