"""Export and import folders of SAELens: `cfg.json` and `sae_weights.safetensors`."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deeplens_lightning.disk.files import write_whole
from deeplens_lightning.sae.activations import BatchTopK, Gated, JumpReLU, ReLU, TopK
from deeplens_lightning.sae.dictionary import Dictionary
from deeplens_lightning.sae.interop.files import fresh_folder
from deeplens_lightning.sae.interop.folding import Plain, center_bias, fold, has_equal_norms, unfold

D = TypeVar("D", bound=Dictionary)

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
FORMAT_VERSION = "6.0.0"  # version of SAELens that introduced this layout

# Fields of `cfg.json` that change what the SAE computes, all of which `from_saelens` respects.
_USED = frozenset(
    {
        "architecture",
        "d_in",
        "d_sae",
        "d_out",
        "k",
        "apply_b_dec_to_input",
        "normalize_activations",
        "rescale_acts_by_decoder_norm",
        "activation_fn",
        "activation_fn_str",
        "activation_fn_kwargs",
        "finetuning_scaling_factor",
        "matryoshka_widths",
    }
)
# Fields that describe the SAE or its training, and are ignored.
_DESCRIPTIVE = frozenset(
    {
        "metadata",
        "dtype",
        "device",
        "reshape_activations",
        "model_name",
        "hook_name",
        "hook_layer",
        "hook_head_index",
        "hook_point",
        "hook_point_layer",
        "hook_point_head_index",
        "prepend_bos",
        "dataset_path",
        "dataset_trust_remote_code",
        "context_size",
        "neuronpedia_id",
        "seqpos_slice",
        "sae_lens_version",
        "sae_lens_training_version",
        "model_from_pretrained_kwargs",
        "lp_norm",
        "decoder_init_norm",
        "aux_loss_coefficient",
        "topk_threshold_lr",
        "use_sparse_activations",
        "l1_coefficient",
        "l1_warm_up_steps",
        "l0_coefficient",
        "l0_warm_up_steps",
        "target_l0",
        "jumprelu_init_threshold",
        "jumprelu_bandwidth",
        "jumprelu_sparsity_loss_mode",
        "jumprelu_tanh_scale",
        "jumprelu_ste_to_input",
        "pre_act_loss_coefficient",
        "use_matryoshka_aux_loss",
    }
)


def export_saelens(
    sae: Dictionary,
    folder: str | Path,
    *,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a folder that `sae_lens.SAE.load_from_disk` reads, with equal latents and reconstructions.

    Arguments, result and errors are those of `PortableDictionary.export_saelens`.
    """
    plain, activation = fold(sae), sae.activation
    architecture, tensors, extra = _describe(sae)
    tensors |= {"W_enc": plain.encoder.T.contiguous(), "W_dec": plain.decoder, "b_dec": plain.decoder_bias}
    if isinstance(activation, Gated):
        tensors |= {"b_gate": plain.encoder_bias}
    else:
        tensors |= {"b_enc": plain.encoder_bias}
    if plain.skip is not None:
        tensors |= {"W_skip": plain.skip.contiguous()}
    known = {"sae_lens_version": FORMAT_VERSION, "sae_lens_training_version": None, **sae.trained_on}
    config = {
        "architecture": architecture,
        "d_in": sae.read.width,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.centers,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **extra,
        "metadata": {**known, **(metadata or {})},
    }
    with fresh_folder(folder, overwrite=overwrite) as new:
        save_file({name: t.detach().float().cpu().contiguous() for name, t in tensors.items()}, new / WEIGHTS)
        write_whole(new / CONFIG, json.dumps(config, indent=2).encode())
    return Path(folder)


def check_export(sae: Dictionary) -> None:
    """Check, before it is trained, that an SAE can be exported.

    Raises:
        ValueError: SAELens has no such architecture.
    """
    _describe(sae)


def from_saelens(kind: type[D], folder: str | Path, *, ignore_fields: Collection[str] = ()) -> D:
    """Read a folder that SAELens or `export_saelens` wrote.

    Arguments, result and errors are those of `PortableDictionary.from_saelens`, with the class to build as `kind`.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} holds no {name}: give the folder in which SAELens saved an SAE"
            )
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    tensors = {name: t.float() for name, t in load_file(folder / WEIGHTS).items()}
    _check(config, ignore_fields)
    architecture, settings, extra = _read_architecture(config, tensors)
    encoder, decoder, decoder_bias = tensors["W_enc"].T, tensors["W_dec"], tensors["b_dec"]
    encoder_bias = tensors["b_gate" if "b_gate" in tensors else "b_enc"]
    if config.get("rescale_acts_by_decoder_norm"):
        norms = torch.linalg.vector_norm(decoder, dim=1)
        encoder, encoder_bias, decoder = (
            encoder * norms[:, None],
            encoder_bias * norms,
            decoder / norms[:, None],
        )
    is_transcoder = "transcoder" in config.get("architecture", "")
    if not is_transcoder and not config.get("apply_b_dec_to_input", True):
        shift = center_bias(encoder, encoder_bias, decoder_bias) - encoder_bias
        encoder_bias = encoder_bias + shift
        if "magnitude_bias" in extra:
            extra["magnitude_bias"] = extra["magnitude_bias"] + shift * extra["log_gain"].exp()
    if is_transcoder:
        names = {"input": encoder.shape[1], "output": decoder.shape[1]}
        settings |= {
            "d_in": names,
            "input_hook": "input",
            "output_hook": "output",
            "skip": "W_skip" in tensors,
        }
    architecture["unit_norm"] = has_equal_norms(decoder)
    sae = kind(**{"d_in": encoder.shape[1], **settings}, d_sae=len(decoder), architecture=architecture)
    plain = Plain(
        encoder=encoder,
        encoder_bias=encoder_bias,
        decoder=decoder,
        decoder_bias=decoder_bias,
        skip=tensors.get("W_skip"),
    )
    metadata = config.get("metadata", {})
    sae.trained_on = {name: metadata[name] for name in ("model_name", "hook_name") if metadata.get(name)}
    unfold(sae, plain, **extra)
    return sae


def _describe(sae: Dictionary) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """SAELens's name of the architecture, and the tensors and config fields that only this architecture has."""
    a = sae.activation
    if len(sae.read.hooks) > 1 or len(sae.write.hooks) > 1:
        raise ValueError("SAELens has no crosscoders: save this one as a checkpoint instead")
    if sae.read.layer_norm:
        raise ValueError(
            "SAELens has no layer_norm on the input alone: save this SAE as a checkpoint instead"
        )
    if sae.is_transcoder:
        stem = "skip_transcoder" if sae.W_skip is not None else "transcoder"
        extra = {"d_out": sae.write.width}
        if isinstance(a, ReLU):
            return stem, {}, extra
        if isinstance(a, BatchTopK | JumpReLU):
            return f"jumprelu_{stem}", {"threshold": a.threshold.detach().expand(sae.d_sae)}, extra
        raise ValueError(
            "SAELens has transcoders with relu, jumprelu or batch_topk only: train with one of these architectures"
        )
    if isinstance(a, BatchTopK | JumpReLU):
        return "jumprelu", {"threshold": a.threshold.detach().expand(sae.d_sae)}, {}
    if isinstance(a, TopK):
        return "topk", {}, {"k": a.k, "rescale_acts_by_decoder_norm": False}
    if isinstance(a, Gated):
        return "gated", {"r_mag": a.log_gain, "b_mag": a.magnitude_bias}, {}
    return "standard", {}, {}


def _check(config: Mapping[str, Any], ignore_fields: Collection[str]) -> None:
    unknown = sorted(set(config) - _USED - _DESCRIPTIVE - set(ignore_fields))
    if unknown:
        raise ValueError(
            f"the SAELens config has fields that are not known here: {', '.join(unknown)}; "
            f"if they do not change what the SAE computes, pass ignore_fields={unknown}"
        )
    if config.get("normalize_activations", "none") not in ("none", None, False, "expected_average_only_in"):
        raise ValueError(
            f"normalize_activations={config['normalize_activations']!r} scales every row by itself, "
            "which cannot be read; 'none' and 'expected_average_only_in' can be read"
        )
    if config.get("finetuning_scaling_factor"):
        raise ValueError(
            "finetuning_scaling_factor cannot be read: fold it into W_dec and set it to false in cfg.json"
        )


def _read_architecture(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The architecture, further arguments of the constructor, and tensors of the activation."""
    name = str(config.get("architecture", "standard")).replace("skip_", "").replace("_transcoder", "")
    function = config.get("activation_fn", config.get("activation_fn_str", "relu"))
    if name in ("standard", "transcoder") and function == "topk":
        return {"name": "topk"}, {"k": int(config["activation_fn_kwargs"]["k"])}, {}
    if name == "topk":
        return {"name": "topk"}, {"k": int(config["k"])}, {}
    if name in ("batchtopk", "matryoshka_batchtopk"):
        spec: dict[str, Any] = {"name": "batch_topk"}
        if config.get("matryoshka_widths"):
            spec["prefixes"] = [int(width) for width in config["matryoshka_widths"]]
        return (
            spec,
            {"k": round(config["k"])},
            {"threshold": tensors["topk_threshold"], "threshold_batches": 1},
        )
    if name == "jumprelu":
        return {"name": "jumprelu"}, {}, {"threshold": tensors["threshold"].clamp(min=0)}
    if name == "gated":
        return {"name": "gated"}, {}, {"log_gain": tensors["r_mag"], "magnitude_bias": tensors["b_mag"]}
    if name in ("standard", "transcoder") and function == "relu":
        return {"name": "relu"}, {}, {}
    raise ValueError(
        f"SAELens's architecture {config.get('architecture')!r} (activation {function!r}) has no equal here; "
        "standard, topk, batchtopk, matryoshka_batchtopk, jumprelu, gated and transcoders can be read. "
        "SAELensModule trains any architecture of SAELens unchanged"
    )
