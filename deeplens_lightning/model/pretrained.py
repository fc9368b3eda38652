"""Load configurations, tokenizers and weights from a hub id, a folder, a `.gguf` file or `demo:lm`.

In: one of these names, and keyword arguments for `from_pretrained`. Out: the configuration, the tokenizer, or the
base model without the layers after the deepest hook point.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from deeplens_lightning.demo import lm_folder
from deeplens_lightning.model.hf_config import has_setting, setting
from deeplens_lightning.model.hook_points import HookPoint
from deeplens_lightning.model.rope import has_dynamic_rope
from deeplens_lightning.model.tracing import base_of, trace
from deeplens_lightning.model.wrappers import unwrapped

logger = logging.getLogger(__name__)

_SOURCE_KEYS = (
    "cache_dir", "force_download", "gguf_file", "local_files_only", "proxies", "revision", "subfolder",
    "token", "trust_remote_code",
)  # fmt: skip
"""Arguments of `from_pretrained` that say where files come from; the configuration and tokenizer need them too."""

_WEIGHT_KEYS = ("dtype", "torch_dtype", "quantization_config", "attn_implementation", "device_map")
"""Arguments of `from_pretrained` that say how weights are loaded."""


@runtime_checkable
class _Dispatched(Protocol):
    """A model that accelerate placed on its devices."""

    hf_device_map: Mapping[str, Any]
    """Device by module path."""


def locate(hf_model: str, model_kwargs: Mapping[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
    """Translate `hf_model` for `from_pretrained`.

    Args:
        hf_model: hub id, folder, `.gguf` file or `demo:lm`.
        model_kwargs: keyword arguments for `from_pretrained`.

    Returns:
        A folder or hub id, and the keyword arguments, with `gguf_file` for a `.gguf` file.

    Raises:
        FileNotFoundError: the folder or file does not exist, or is no model.
    """
    kwargs = dict(model_kwargs or {})
    if hf_model == "demo:lm":
        return str(lm_folder()), kwargs
    if hf_model.startswith("demo:"):
        raise FileNotFoundError(f"hf_model={hf_model!r} is unknown; the embedded model is 'demo:lm'")
    path = Path(hf_model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(
                f"hf_model={hf_model!r}: there is no such file; give the path of a .gguf file"
            )
        return str(path.parent), kwargs | {"gguf_file": path.name}
    if path.is_dir() and "gguf_file" not in kwargs:
        inner = path / str(kwargs.get("subfolder", ""))
        if not (inner / "config.json").is_file():
            raise FileNotFoundError(
                f"hf_model={hf_model!r} is a folder without config.json; give a folder that save_pretrained "
                "wrote, or the path of a .gguf file"
            )
    elif not path.exists() and (
        path.is_absolute() or hf_model.startswith((".", "~")) or hf_model.count("/") > 1
    ):
        raise FileNotFoundError(f"hf_model={hf_model!r}: there is no such folder; give a folder or a hub id")
    return str(path) if path.exists() else hf_model, kwargs


def load_config(hf_model: str, model_kwargs: Mapping[str, Any] | None = None) -> PretrainedConfig:
    """Load the configuration of a model, without its weights.

    Args:
        hf_model: hub id, folder, `.gguf` file or `demo:lm`.
        model_kwargs: keyword arguments for `from_pretrained`; those that name a setting of the configuration
            change it.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: its configuration cannot be read.
    """
    name, kwargs = locate(hf_model, model_kwargs)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(name, **_only(kwargs, _SOURCE_KEYS))
    except OSError as error:
        raise FileNotFoundError(
            f"hf_model={hf_model!r} is no local folder and cannot be loaded from the hub: {_first_line(error)}"
        ) from error
    for key, value in kwargs.items():
        if key not in (*_SOURCE_KEYS, *_WEIGHT_KEYS) and has_setting(config, key):
            setattr(config, key, value)
    return config


def load_tokenizer(
    hf_model: str | nn.Module,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    config: PretrainedConfig | None = None,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer that is named, or the model's own; return a tokenizer object as it is.

    Args:
        hf_model: name of the model, or the model.
        tokenizer: a tokenizer, or its hub id or folder; None for the model's own.
        model_kwargs: keyword arguments for `from_pretrained` of the model; those that say where files come from
            (`revision`, `cache_dir`, ...) are used for the model's own tokenizer too.
        config: configuration of the model; if given, the size of the tokenizer's vocabulary is checked.

    Raises:
        ValueError: there is no tokenizer, or it has more tokens than the model's embedding has rows.
    """
    if tokenizer is None or isinstance(tokenizer, str):
        own = hf_model if isinstance(hf_model, str) else str(unwrapped(hf_model).name_or_path)
        source = tokenizer or own
        tokenizer = _own_tokenizer(source, model_kwargs if tokenizer is None else None)
    rows = None if config is None else setting(config.get_text_config(), "vocab_size")
    if rows is not None and len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model's embedding has {rows} rows; give the "
            "tokenizer that the model was trained with as tokenizer="
        )
    return tokenizer


def _own_tokenizer(source: str, model_kwargs: Mapping[str, Any] | None) -> PreTrainedTokenizerBase:
    advice = "give tokenizer= a folder, a hub id or a tokenizer"
    if not source:
        raise ValueError(f"the model was built from a configuration and has no tokenizer; {advice}")
    folder = Path(source).expanduser()
    if folder.is_dir() and not (model_kwargs or {}).get("gguf_file"):
        name, where = (
            str(folder),
            _only(model_kwargs or {}, _SOURCE_KEYS),
        )  # unlike a model, it needs no config.json
    else:
        name, kwargs = locate(source, model_kwargs)
        where = _only(kwargs, _SOURCE_KEYS)
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, **where)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{source!r} has no tokenizer ({_first_line(error)}); {advice}") from error
    return found


def max_positions(model: PretrainedConfig | nn.Module) -> int | None:
    """The longest sequence that a model takes, in tokens; None if there is no limit."""
    config = model if isinstance(model, PretrainedConfig) else unwrapped(model).config
    if has_dynamic_rope(config):
        return None
    text = config.get_text_config()
    limit: int | None = setting(text, "max_position_embeddings") or setting(text, "max_seq_len") or None
    for path, module in trace(model).base.named_modules():
        if isinstance(module, nn.Embedding) and "position" in path and module.padding_idx is not None:
            limit = module.num_embeddings - module.padding_idx - 1  # as in RoBERTa: positions start there
    return limit


def load_base(
    hf_model: str,
    config: PretrainedConfig,
    hook_points: Sequence[HookPoint],
    device: torch.device,
    model_kwargs: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Load the base model up to the deepest layer that the hook points need, frozen and in evaluation mode.

    Args:
        hf_model: hub id, folder, `.gguf` file or `demo:lm`.
        config: configuration of the whole model, from `load_config`.
        hook_points: from `resolve`, of the same model.
        device: where the model goes, unless `model_kwargs` has a `device_map`.
        model_kwargs: keyword arguments for `from_pretrained`.

    Raises:
        ValueError: the files lack weights, or a quantised model cannot run on the device.
    """
    name, kwargs = locate(hf_model, model_kwargs)
    kwargs = {
        key: value
        for key, value in kwargs.items()
        if key in (*_SOURCE_KEYS, *_WEIGHT_KEYS) or not has_setting(config, key)
    }
    short = cut(config, [point.layer for point in hook_points])
    encoder = config.is_encoder_decoder and type(config) in AutoModelForTextEncoding._model_mapping
    auto = AutoModelForTextEncoding if encoder else AutoModel
    try:
        with torch.random.fork_rng(devices=[]), _without_load_report():
            whole, info = auto.from_pretrained(name, config=short, output_loading_info=True, **kwargs)
        if "device_map" not in kwargs and not isinstance(whole, _Dispatched):
            whole.to(device)
    except (ImportError, RuntimeError, ValueError) as error:
        method = kwargs.get("quantization_config") or setting(config, "quantization_config")
        if method is None:
            raise
        raise ValueError(
            f"hf_model={hf_model!r} is quantised and cannot run on {device}: {_first_line(error)}; give the "
            "unquantised model, or another device"
        ) from error
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    if missing:
        raise ValueError(
            f"hf_model={hf_model!r} lacks {len(missing)} weights of its architecture, such as {missing[0]!r}, which "
            "would be random; give a complete checkpoint of this architecture"
        )
    whole.eval().requires_grad_(False)
    base: PreTrainedModel = base_of(whole)
    return base


def cut(config: PretrainedConfig, layers: Sequence[int | None]) -> PretrainedConfig:
    """The configuration of a model that ends after the deepest of these layers.

    Args:
        config: configuration of the whole model.
        layers: `HookPoint.layer` of each hook point; None needs every layer.

    Returns:
        A copy of `config` with fewer layers; with all of them where they are needed, or where the model cannot end
        earlier: the computation of a layer depends on the number of layers, or on a layer that would be cut off.
    """
    full = trace(config)
    needed = [layer for layer in layers if layer is not None]
    if len(needed) < len(layers) or max(needed) + 1 == full.depth:
        return copy.deepcopy(config)
    kinds = setting(config.get_text_config(), "layer_types") or [""]
    one_of_each = max(map(kinds.index, kinds)) + 1  # some models make a mask for each kind of layer
    for depth in sorted({max(needed) + 1, max(max(needed) + 1, one_of_each)} - {full.depth}):
        try:
            short = _ending_after(config, depth)
            if trace(short).operations[: depth + 1] == full.operations[: depth + 1]:
                return short
        except (NotImplementedError, ValueError, LookupError) as error:
            # The configuration computes its depth from several numbers, or needs a layer that was cut off.
            logger.info("the model cannot end after layer %d: %s", depth - 1, error)
    logger.info("every layer is loaded, because the layers of this model depend on the number of layers")
    return copy.deepcopy(config)


def _ending_after(config: PretrainedConfig, depth: int) -> PretrainedConfig:
    """A copy of a configuration with `depth` layers."""
    short = copy.deepcopy(config)
    text = short.get_text_config()
    for key, value in text.to_dict().items():
        if isinstance(value, list) and len(value) == text.num_hidden_layers:
            setattr(text, key, value[:depth])
    text.num_hidden_layers = depth
    return short


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Silence the list of unused weights that transformers logs; `load_base` raises for missing ones."""
    source = logging.getLogger("transformers.modeling_utils")

    def other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    source.addFilter(other)
    try:
        yield
    finally:
        source.removeFilter(other)


def _only(kwargs: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key in keys}


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
