"""Reading checkpoints of dictionary_learning, sparsify and DeepLens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from deeplens_lightning.sae.interop.folding import Plain, center_bias, has_unit_rows, unfold

if TYPE_CHECKING:
    from deeplens_lightning.sae.module import SparseAutoencoder

_DICTIONARY_LEARNING = {
    "AutoEncoder": "relu",
    "AutoEncoderNew": "relu",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batch_topk",
    "MatryoshkaBatchTopKSAE": "batch_topk",
    "JumpReluAutoEncoder": "jumprelu",
    "GatedAutoEncoder": "gated",
}


def from_dictionary_learning(folder: str | Path) -> SparseAutoencoder:
    """Read a folder of saprmarks/dictionary_learning: `ae.pt` and `config.json`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a class of dictionary that is not known here.
    """
    config = json.loads(_require(Path(folder) / "config.json").read_text())["trainer"]
    t: dict[str, Tensor] = torch.load(_require(Path(folder) / "ae.pt"), map_location="cpu", weights_only=True)
    kind = config["dict_class"]
    if kind not in _DICTIONARY_LEARNING:
        raise ValueError(f"dict_class {kind!r} is not known here; {', '.join(_DICTIONARY_LEARNING)} are")
    encoder = t["encoder.weight"] if "encoder.weight" in t else t["W_enc"].T
    decoder = t["decoder.weight"].T if "decoder.weight" in t else t["W_dec"]
    decoder_bias = _first(t, "b_dec", "bias", "decoder_bias", "decoder.bias")
    encoder_bias = _first(t, "encoder.bias", "b_enc", "gate_bias")
    spec: dict[str, Any] = {"name": _DICTIONARY_LEARNING[kind]}
    extra: dict[str, Any] = {}
    if spec["name"] == "gated":
        extra = {"log_gain": t["r_mag"], "magnitude_bias": t["mag_bias"]}
    elif spec["name"] == "jumprelu":
        extra = {"threshold": t["threshold"].clamp(min=0)}
    if kind in ("AutoEncoderNew", "JumpReluAutoEncoder"):  # these encode without subtracting b_dec
        encoder_bias = center_bias(encoder, encoder_bias, decoder_bias)
    if spec["name"] == "batch_topk":
        extra = {"threshold": t["threshold"].reshape(()), "threshold_batches": 1}
    if "group_sizes" in t or "group_sizes" in config:
        sizes = torch.as_tensor(t.get("group_sizes", config.get("group_sizes")))
        spec["prefixes"] = sizes.cumsum(0).tolist()
    k = int(config.get("k", t.get("k", torch.tensor(32))))
    return _build(
        spec,
        k,
        Plain(encoder=encoder, encoder_bias=encoder_bias, decoder=decoder, decoder_bias=decoder_bias),
        extra,
    )


def from_sparsify(
    folder: str | Path, *, input_hook: str = "input", output_hook: str = "output"
) -> SparseAutoencoder:
    """Read a folder of EleutherAI/sparsify: `sae.safetensors` and `cfg.json`.

    Args:
        folder: one hook point's folder.
        input_hook: name of the hook point that a transcoder reads.
        output_hook: name of the one that it writes.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: signed or grouped activations, which have no equal here.
    """
    config = json.loads(_require(Path(folder) / "cfg.json").read_text())
    t = load_file(_require(Path(folder) / "sae.safetensors"))
    if config.get("signed") or config.get("activation", "topk") != "topk":
        raise ValueError(
            "only unsigned top-k dictionaries of sparsify can be read: this one is signed or grouped"
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
        raise ValueError("an autoencoder with a skip connection has no equal here")
    plain = Plain(
        encoder=encoder,
        encoder_bias=t["encoder.bias"],
        decoder=decoder,
        decoder_bias=t["b_dec"],
        skip=t.get("W_skip"),
    )
    return _build({"name": "topk"}, int(config["k"]), plain, {}, settings)


def from_deeplens(weights: str | Path | Mapping[str, Tensor], *, k: int | None = None) -> SparseAutoencoder:
    """Read the weights of DeepLens's `SparseAutoencoder`: a file that `torch.save` made, or a state dict.

    Its LayerNorm becomes `layer_norm=True`, with gain and offset folded into the encoder.

    Args:
        weights: a path, a state dict, or a checkpoint that holds one under "model_state_dict".
        k: the `k` that it was trained with; None for its ReLU with L1.

    Raises:
        FileNotFoundError: no such file.
        ValueError: this is not such a state dict.
    """
    if isinstance(weights, Mapping):
        t = dict(weights)
    else:
        t = torch.load(_require(Path(weights)), map_location="cpu", weights_only=True)
    for key in ("model_state_dict", "state_dict"):
        t = t.get(key, t)  # type: ignore[assignment]
    if "encoder.weight" not in t or "encoder.bias" not in t:
        raise ValueError(f"not the weights of a DeepLens SparseAutoencoder: found {', '.join(list(t)[:5])}")
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
    return _build(spec, k or 1, plain, {}, {"layer_norm": "norm.weight" in t})


def _build(
    spec: dict[str, Any], k: int, plain: Plain, extra: dict[str, Any], settings: dict[str, Any] | None = None
) -> SparseAutoencoder:
    from deeplens_lightning.sae.module import SparseAutoencoder

    spec["unit_norm"] = has_unit_rows(plain.decoder)
    chosen = {"d_in": plain.encoder.shape[1], **(settings or {})}
    sae = SparseAutoencoder(**chosen, d_sae=len(plain.decoder), k=k, architecture=spec)
    return unfold(sae, plain, **extra)


def _require(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    return path


def _first(tensors: Mapping[str, Tensor], *names: str) -> Tensor:
    for name in names:
        if name in tensors:
            return tensors[name]
    raise ValueError(f"the checkpoint holds none of {', '.join(names)}; it holds {', '.join(tensors)}")
