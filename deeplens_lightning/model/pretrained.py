"""Configurations, tokenizers and weights, from wherever people keep them.

In: a hub id, a folder, a `.gguf` file or `demo:lm`, and keyword arguments for `from_pretrained`.
Out: the configuration, the tokenizer, or the base model cut behind the deepest hook point.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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

from deeplens_lightning.model.hook_points import HookPoint
from deeplens_lightning.model.tracing import base_of, trace

logger = logging.getLogger(__name__)

_WHERE = (
    "cache_dir", "force_download", "gguf_file", "local_files_only", "proxies", "revision", "subfolder",
    "token", "trust_remote_code",
)  # fmt: skip
_HOW = ("dtype", "torch_dtype", "quantization_config", "attn_implementation", "device_map")


def locate(hf_model: str, model_kwargs: Mapping[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` needs: a folder or hub id, and keyword arguments.

    Raises:
        FileNotFoundError: a folder or file that is not there, or is no model.
    """
    kwargs = dict(model_kwargs or {})
    if hf_model == "demo:lm":
        from deeplens_lightning.demo import lm_folder

        return str(lm_folder()), kwargs
    if hf_model.startswith("demo:"):
        raise FileNotFoundError(f"hf_model={hf_model!r} is unknown; the embedded model is 'demo:lm'")
    path = Path(hf_model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"hf_model={hf_model!r}: there is no such file")
        return str(path.parent), kwargs | {"gguf_file": path.name}
    if path.is_dir() and "gguf_file" not in kwargs:
        inner = path / str(kwargs.get("subfolder", ""))
        if not (inner / "config.json").is_file():
            raise FileNotFoundError(
                f"hf_model={hf_model!r} is a folder without config.json; give the one that save_pretrained "
                "wrote, or the path of a .gguf file"
            )
    elif not path.exists() and (
        path.is_absolute() or hf_model.startswith((".", "~")) or hf_model.count("/") > 1
    ):
        raise FileNotFoundError(f"hf_model={hf_model!r}: there is no such folder")
    return str(path) if path.exists() else hf_model, kwargs


def load_config(hf_model: str, model_kwargs: Mapping[str, Any] | None = None) -> PretrainedConfig:
    """The configuration of a model, with what `model_kwargs` changes in it; no weights.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: its configuration cannot be read.
    """
    name, kwargs = locate(hf_model, model_kwargs)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(name, **_only(kwargs, _WHERE))
    except OSError as error:
        raise FileNotFoundError(
            f"hf_model={hf_model!r} is no folder here and the hub does not give it: {_first_line(error)}"
        ) from error
    for key, value in kwargs.items():
        if key not in (*_WHERE, *_HOW) and hasattr(config, key):
            setattr(config, key, value)
    return config


def load_tokenizer(
    hf_model: str | PreTrainedModel,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    config: PretrainedConfig | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer that is given or named, or the model's own.

    Args:
        hf_model: the model.
        tokenizer: a tokenizer, the name or folder of one, or None.
        model_kwargs: those of the model; revision and the like count for the tokenizer too.
        config: of the model; with it the tokenizer's vocabulary is checked against the embedding.

    Raises:
        ValueError: there is none, or it has more tokens than the model's embedding has rows.
    """
    if tokenizer is None or isinstance(tokenizer, str):
        source = tokenizer or (hf_model if isinstance(hf_model, str) else str(hf_model.name_or_path))
        tokenizer = _own_tokenizer(source, model_kwargs if tokenizer is None else None)
    rows = None if config is None else getattr(config.get_text_config(), "vocab_size", None)
    if rows is not None and len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer knows {len(tokenizer)} tokens, but the model's embedding has {rows} rows; give "
            "tokenizer= the one that the model was trained with"
        )
    return tokenizer


def _own_tokenizer(source: str, model_kwargs: Mapping[str, Any] | None) -> PreTrainedTokenizerBase:
    advice = "give tokenizer= a folder, a hub id or a tokenizer"
    if not source:
        raise ValueError(f"the model was built from a configuration and names no tokenizer; {advice}")
    folder = Path(source).expanduser()
    if folder.is_dir() and not (model_kwargs or {}).get("gguf_file"):
        name, where = str(folder), _only(model_kwargs or {}, _WHERE)  # needs no config.json
    else:
        name, kwargs = locate(source, model_kwargs)
        where = _only(kwargs, _WHERE)
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, **where)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{source!r} has no tokenizer ({_first_line(error)}); {advice}") from error
    return found


def max_positions(model: PretrainedConfig | PreTrainedModel) -> int | None:
    """The longest sequence that a model takes, in tokens; None where nothing bounds it."""
    config = model if isinstance(model, PretrainedConfig) else model.config
    text = config.get_text_config()
    limit: int | None = next(
        (
            getattr(text, key)
            for key in ("max_position_embeddings", "max_seq_len")
            if getattr(text, key, None)
        ),
        None,
    )
    if _rope_types(config) & {"dynamic"}:
        return None  # made to be exceeded
    for path, module in trace(model).base.named_modules():
        if isinstance(module, nn.Embedding) and "position" in path and module.padding_idx is not None:
            limit = module.num_embeddings - module.padding_idx - 1  # RoBERTa counts from there
    return limit


def original_context(config: PretrainedConfig) -> int | None:
    """The length beyond which RoPE is scaled by the length of the sequence itself; None where it never is."""
    text = config.get_text_config()
    lengths = [
        rope.get("original_max_position_embeddings") or text.max_position_embeddings
        for rope in _ropes(config)
        if rope.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(lengths, default=None)


def load_base(
    hf_model: str,
    config: PretrainedConfig,
    hook_points: Sequence[HookPoint],
    device: torch.device,
    model_kwargs: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Weights up to the deepest layer that the hook points need, frozen, on a device."""
    name, kwargs = locate(hf_model, model_kwargs)
    kwargs = {
        key: value for key, value in kwargs.items() if key in (*_WHERE, *_HOW) or not hasattr(config, key)
    }
    short = cut(config, [point.layer for point in hook_points])
    encoder = config.is_encoder_decoder and type(config) in AutoModelForTextEncoding._model_mapping
    auto = AutoModelForTextEncoding if encoder else AutoModel
    try:
        with torch.random.fork_rng(devices=[]), _without_load_report():
            whole, info = auto.from_pretrained(name, config=short, output_loading_info=True, **kwargs)
        if "device_map" not in kwargs and getattr(whole, "hf_device_map", None) is None:
            whole.to(device)
    except (ImportError, RuntimeError, ValueError) as error:
        method = kwargs.get("quantization_config") or getattr(config, "quantization_config", None)
        if method is None:
            raise
        raise ValueError(
            f"{hf_model!r} is quantised and cannot run on {device}: {_first_line(error)}; give the "
            "unquantised model, or another device"
        ) from error
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    if missing:
        raise ValueError(
            f"{hf_model!r} lacks {len(missing)} weights that its configuration asks for, such as "
            f"{missing[0]!r}; they would be random"
        )
    whole.eval().requires_grad_(False)
    base: PreTrainedModel = base_of(whole)
    return base


def cut(config: PretrainedConfig, layers: Sequence[int | None]) -> PretrainedConfig:
    """The configuration of a model that ends behind the deepest layer, if it does the same up to there."""
    full = trace(config)
    short = copy.deepcopy(config)
    needed = [layer for layer in layers if layer is not None]
    if len(needed) < len(layers) or max(needed) + 1 == full.depth:
        return short
    text, depth = short.get_text_config(), max(needed) + 1
    for key, value in vars(text).items():
        if isinstance(value, list) and len(value) == text.num_hidden_layers:
            setattr(text, key, value[:depth])
    try:
        text.num_hidden_layers = depth
    except NotImplementedError:  # several depths in one configuration
        return copy.deepcopy(config)
    if trace(short).operations[: depth + 1] != full.operations[: depth + 1]:
        logger.info("every layer is loaded: in this architecture, layers depend on how many there are")
        return copy.deepcopy(config)
    return short


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Keep transformers from listing the layers that are left out; what is missing raises instead."""
    source = logging.getLogger("transformers.modeling_utils")

    def other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    source.addFilter(other)
    try:
        yield
    finally:
        source.removeFilter(other)


def _ropes(config: PretrainedConfig) -> list[Mapping[str, Any]]:
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, Mapping)]
    return nested or [rope]


def _rope_types(config: PretrainedConfig) -> set[str]:
    return {rope.get("rope_type", "default") for rope in _ropes(config)}


def _only(kwargs: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key in keys}


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
