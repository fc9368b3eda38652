"""Import checkpoints of dictionary_learning, sparsify and DeepLens.

Each function builds the class that it is given: `Dictionary`, or a subclass with the same constructor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from deeplens_lightning.sae.dictionary import Dictionary
from deeplens_lightning.sae.interop.folding import Plain, center_bias, has_equal_norms, unfold

D = TypeVar("D", bound=Dictionary)

_ARCHITECTURES = {  # by `dict_class` of dictionary_learning
    "AutoEncoder": "relu",
    "AutoEncoderNew": "relu",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batch_topk",
    "MatryoshkaBatchTopKSAE": "batch_topk",
    "JumpReluAutoEncoder": "jumprelu",
    "GatedAutoEncoder": "gated",
}


def from_dictionary_learning(kind: type[D], folder: str | Path) -> D:
    """Read a folder of saprmarks/dictionary_learning: `ae.pt` and `config.json`.

    Arguments and errors are those of `PortableDictionary.from_dictionary_learning`, with the class to build as `kind`.
    """
    config = json.loads(_require(Path(folder) / "config.json").read_text())["trainer"]
    t: dict[str, Tensor] = torch.load(_require(Path(folder) / "ae.pt"), map_location="cpu", weights_only=True)
    name = config["dict_class"]
    if name not in _ARCHITECTURES:
        raise ValueError(
            f"dict_class {name!r} in config.json cannot be read; {', '.join(_ARCHITECTURES)} can be read"
        )
    encoder = t["encoder.weight"] if "encoder.weight" in t else t["W_enc"].T
    decoder = t["decoder.weight"].T if "decoder.weight" in t else t["W_dec"]
    decoder_bias = _first(t, "b_dec", "bias", "decoder_bias", "decoder.bias")
    encoder_bias = _first(t, "encoder.bias", "b_enc", "gate_bias")
    spec: dict[str, Any] = {"name": _ARCHITECTURES[name]}
    extra: dict[str, Any] = {}
    if spec["name"] == "gated":
        extra = {"log_gain": t["r_mag"], "magnitude_bias": t["mag_bias"]}
    elif spec["name"] == "jumprelu":
        extra = {"threshold": t["threshold"].clamp(min=0)}
    if name in ("AutoEncoderNew", "JumpReluAutoEncoder"):  # these encode without subtracting b_dec
        encoder_bias = center_bias(encoder, encoder_bias, decoder_bias)
    if spec["name"] == "batch_topk":
        extra = {"threshold": t["threshold"].reshape(()), "threshold_batches": 1}
    if "group_sizes" in t or "group_sizes" in config:
        sizes = torch.as_tensor(t.get("group_sizes", config.get("group_sizes")))
        spec["prefixes"] = sizes.cumsum(0).tolist()
    k = int(config.get("k", t.get("k", torch.tensor(32))))
    plain = Plain(encoder=encoder, encoder_bias=encoder_bias, decoder=decoder, decoder_bias=decoder_bias)
    return _build(kind, spec, k, plain, extra)


def from_sparsify(
    kind: type[D], folder: str | Path, *, input_hook: str = "input", output_hook: str = "output"
) -> D:
    """Read a folder of EleutherAI/sparsify: `sae.safetensors` and `cfg.json`.

    Arguments and errors are those of `PortableDictionary.from_sparsify`, with the class to build as `kind`.
    """
    config = json.loads(_require(Path(folder) / "cfg.json").read_text())
    t = load_file(_require(Path(folder) / "sae.safetensors"))
    if config.get("signed") or config.get("activation", "topk") != "topk":
        raise ValueError(
            "only unsigned top-k dictionaries of sparsify can be read: cfg.json has "
            f"signed={config.get('signed', False)}, activation={config.get('activation', 'topk')!r}"
        )
    encoder, decoder = t["encoder.weight"], t["W_dec"]
    settings: dict[str, Any] = {}
    if config.get("transcode"):
        widths = {input_hook: encoder.shape[1], output_hook: decoder.shape[1]}
        settings = {
            "d_in": widths,
            "input_hook": input_hook,
            "output_hook": output_hook,
            "skip": "W_skip" in t,
        }
    elif "W_skip" in t:
        raise ValueError(
            "an autoencoder with a skip connection (W_skip) cannot be read; a transcoder with one can"
        )
    plain = Plain(
        encoder=encoder,
        encoder_bias=t["encoder.bias"],
        decoder=decoder,
        decoder_bias=t["b_dec"],
        skip=t.get("W_skip"),
    )
    return _build(kind, {"name": "topk"}, int(config["k"]), plain, {}, settings)


def from_deeplens(kind: type[D], weights: str | Path | Mapping[str, Tensor], *, k: int | None = None) -> D:
    """Read the weights of DeepLens's `SparseAutoencoder`: a file written by `torch.save`, or a state dict.

    Arguments and errors are those of `PortableDictionary.from_deeplens`, with the class to build as `kind`.
    """
    if isinstance(weights, Mapping):
        t = dict(weights)
    else:
        t = torch.load(_require(Path(weights)), map_location="cpu", weights_only=True)
    for key in ("model_state_dict", "state_dict"):
        t = t.get(key, t)  # type: ignore[assignment]
    if "encoder.weight" not in t or "encoder.bias" not in t:
        raise ValueError(
            "a DeepLens SparseAutoencoder has encoder.weight and encoder.bias, but the state dict has "
            f"{', '.join(list(t)[:5])}"
        )
    encoder, encoder_bias = t["encoder.weight"].double(), t["encoder.bias"].double()
    decoder = t["decoder.weight"].T if "decoder.weight" in t else t["encoder.weight"]
    if "norm.weight" in t:
        encoder_bias = encoder_bias + encoder @ t["norm.bias"].double()
        encoder = encoder * t["norm.weight"].double()
    plain = Plain(
        encoder=encoder.float(),
        encoder_bias=encoder_bias.float(),
        decoder=decoder.float(),
        decoder_bias=torch.zeros(decoder.shape[1]),
    )
    spec = {"name": "relu"} if k is None else {"name": "topk"}
    return _build(kind, spec, k or 1, plain, {}, {"layer_norm": "norm.weight" in t})


def _build(
    kind: type[D],
    spec: dict[str, Any],
    k: int,
    plain: Plain,
    extra: dict[str, Any],
    settings: dict[str, Any] | None = None,
) -> D:
    """A dictionary with these weights.

    Args:
        kind: the class to build.
        spec: the architecture, as `architecture_spec` gives it.
        k: number of active latents per row.
        plain: the weights.
        extra: parameters and buffers of the activation by name.
        settings: further arguments of the constructor.
    """
    spec["unit_norm"] = has_equal_norms(plain.decoder)
    chosen = {"d_in": plain.encoder.shape[1], **(settings or {})}
    sae = kind(**chosen, d_sae=len(plain.decoder), k=k, architecture=spec)
    unfold(sae, plain, **extra)
    return sae


def _require(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    return path


def _first(tensors: Mapping[str, Tensor], *names: str) -> Tensor:
    for name in names:
        if name in tensors:
            return tensors[name]
    raise ValueError(f"the checkpoint has none of {', '.join(names)}; it has {', '.join(tensors)}")
