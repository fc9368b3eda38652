"""Tiny random models of many families, with the module paths of their hook points, written by hand.

Tests compare the paths that the package finds with these.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModel, PretrainedConfig, PreTrainedModel

COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Family:
    """The configuration of a family, and module paths inside a layer (with `:in` for a module's input)."""

    model_type: str
    layers: str
    mlp: str = "mlp"
    act: str | None = "mlp.act_fn"
    down: str | None = "mlp.down_proj"
    out: str = "mlp"
    attn: str = "self_attn"
    z: str = "self_attn.o_proj"
    mid: str | None = "post_attention_layernorm"
    norm: str | None = "norm"
    config: dict[str, Any] = field(default_factory=dict)
    scale: float = 1.0
    post_norm: bool = False

    def places(self, index: int) -> dict[str, tuple[str, float]]:
        """Module path and multiplier of each kind of hook point that a layer of this family has."""
        layer = f"{self.layers}.{index}"
        found = {
            "mlp_in": (f"{layer}.{self.mlp}:in", 1.0),
            "mlp_act": (f"{layer}.{self.act}", 1.0) if self.act else None,
            "mlp_post": (f"{layer}.{self.down}:in", 1.0) if self.down else None,
            "mlp_out": (f"{layer}.{self.out}", self.scale),
            "attn_out": (f"{layer}.{self.attn}", self.scale),
            "attn_z": (f"{layer}.{self.z}:in", 1.0),
            "resid_pre": (f"{layer}:in", 1.0),
            "resid_mid": (f"{layer}.{self.mid}:in", 1.0) if self.mid else None,
            "resid_post": (layer, 1.0),
            "final_norm": (self.norm, 1.0) if self.norm else None,
        }
        return {kind: place for kind, place in found.items() if place}


def _llama(model_type: str, **changes: Any) -> Family:
    return Family(model_type, "layers", **changes)


def _gpt2(model_type: str, **changes: Any) -> Family:
    names = {
        "act": "mlp.act",
        "down": "mlp.c_proj",
        "attn": "attn",
        "z": "attn.c_proj",
        "mid": "ln_2",
        "norm": "ln_f",
    }
    return Family(model_type, "h", **{**names, **changes})


def _neox(model_type: str, **changes: Any) -> Family:
    names = {"act": "mlp.act", "down": "mlp.dense_4h_to_h", "attn": "attention", "z": "attention.dense"}
    return Family(model_type, "layers", **{**names, "norm": "final_layer_norm", **changes})


def _bert(model_type: str, **changes: Any) -> Family:
    return Family(
        model_type,
        "encoder.layer",
        mlp="intermediate",
        act="intermediate.intermediate_act_fn",
        down="output.dense",
        out="output.dense",
        attn="attention.output.dense",
        z="attention.output.dense",
        mid="intermediate",
        norm=None,
        post_norm=True,
        **changes,
    )


_SANDWICH = {
    "attn": "post_attention_layernorm",
    "mid": "pre_feedforward_layernorm",
    "out": "post_feedforward_layernorm",
}
_MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
_LOCAL = {"attention_types": [[["global", "local", "global"], 1]], "window_size": 8}
_EXPERTS = {"act": None, "down": None}
_FALCON = {"attn": "self_attention", "z": "self_attention.dense", "norm": "ln_f"}
MOE = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "decoder_sparse_step": 1,
}

FAMILIES: dict[str, Family] = {
    "gpt2": _gpt2("gpt2", config={"n_inner": None}),
    "gpt_neo": _gpt2("gpt_neo", z="attn.attention.out_proj", config={"num_layers": 3, **_LOCAL}),
    "gpt_bigcode": _gpt2("gpt_bigcode", config={"n_inner": 48}),
    "gptj": _gpt2("gptj", down="mlp.fc_out", z="attn.out_proj", mid=None, config={"rotary_dim": 8}),
    "codegen": _gpt2("codegen", down="mlp.fc_out", z="attn.out_proj", mid=None, config={"rotary_dim": 8}),
    "gpt_neox": _neox("gpt_neox", mid=None),
    "gpt_neox_sequential": _neox("gpt_neox", config={"use_parallel_residual": False}),
    "llama": _llama("llama", config={"num_key_value_heads": 2}),
    "mistral": _llama("mistral", config={"sliding_window": 8}),
    "qwen2": _llama("qwen2"),
    "qwen3": _llama("qwen3", config={"head_dim": 16}),
    "gemma": _llama("gemma", config={"head_dim": 16}),
    "gemma2": _llama("gemma2", config={"head_dim": 16, "sliding_window": 8}, **_SANDWICH),
    "gemma3": _llama("gemma3_text", config={"head_dim": 16, "sliding_window": 8}, **_SANDWICH),
    "olmo": _llama("olmo"),
    "olmo2": _llama("olmo2", **{**_SANDWICH, "mid": "mlp"}),
    "glm4": _llama(
        "glm4",
        act="mlp.activation_fn",
        attn="post_self_attn_layernorm",
        out="post_mlp_layernorm",
        config={"head_dim": 8},
    ),
    "granite": _llama("granite", scale=0.22, config={"residual_multiplier": 0.22}),
    "cohere": _llama("cohere", mid=None),
    "starcoder2": _llama("starcoder2", act="mlp.act", down="mlp.c_proj"),
    "stablelm": _llama("stablelm"),
    "stablelm_parallel": _llama("stablelm", mid=None, config={"use_parallel_residual": True}),
    "phi": _llama(
        "phi",
        act="mlp.activation_fn",
        down="mlp.fc2",
        z="self_attn.dense",
        mid=None,
        norm="final_layernorm",
    ),
    "phi3": _llama("phi3", act="mlp.activation_fn"),
    "minicpm3": _llama("minicpm3", scale=1.4 / 3**0.5, config=_MLA),
    "mixtral": _llama("mixtral", config=MOE, **_EXPERTS),
    "qwen3_moe": _llama("qwen3_moe", config=MOE, **_EXPERTS),
    "gpt_oss": _llama("gpt_oss", config={**MOE, "head_dim": 8, "sliding_window": 8}, **_EXPERTS),
    "deepseek_v3": _llama(
        "deepseek_v3",
        config={
            **MOE,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 3,
            **_MLA,
        },
    ),
    "lfm2": Family(
        "lfm2",
        "layers",
        mlp="feed_forward",
        act=None,
        down="feed_forward.w2",
        out="feed_forward",
        z="self_attn.out_proj",
        mid="ffn_norm",
        norm="embedding_norm",
        config={"layer_types": ["full_attention"] * 3},
    ),
    "opt": Family(
        "opt",
        "decoder.layers",
        mlp="fc1",
        act="activation_fn",
        down="fc2",
        out="fc2",
        z="self_attn.out_proj",
        mid="final_layer_norm",
        norm="decoder.final_layer_norm",
        config={"ffn_dim": 48, "word_embed_proj_dim": 32},
    ),
    "xglm": Family(
        "xglm",
        "layers",
        mlp="fc1",
        act="activation_fn",
        down="fc2",
        out="fc2",
        z="self_attn.out_proj",
        mid="final_layer_norm",
        norm="layer_norm",
        config={"ffn_dim": 48, "d_model": 32, "attention_heads": 4, "num_layers": 3},
    ),
    "bloom": Family(
        "bloom",
        "h",
        act="mlp.gelu_impl",
        down="mlp.dense_4h_to_h",
        out="mlp.dense_4h_to_h",
        attn="self_attention.dense",
        z="self_attention.dense",
        norm="ln_f",
        config={"n_layer": 3, "n_head": 4},
    ),
    "falcon": Family(
        "falcon",
        "h",
        act="mlp.act",
        down="mlp.dense_4h_to_h",
        mid=None,
        config={"ffn_hidden_size": 48},
        **_FALCON,
    ),
    "falcon_sequential": Family(
        "falcon",
        "h",
        act="mlp.act",
        down="mlp.dense_4h_to_h",
        config={"ffn_hidden_size": 48, "parallel_attn": False},
        **_FALCON,
    ),
    "mpt": Family(
        "mpt",
        "blocks",
        mlp="ffn",
        act="ffn.act",
        down="ffn.down_proj",
        out="ffn.down_proj",
        attn="attn",
        z="attn.out_proj",
        mid="norm_2",
        norm="norm_f",
        config={"d_model": 32, "n_heads": 4, "n_layers": 3, "expansion_ratio": 2, "max_seq_len": 64},
    ),
    "bert": _bert("bert"),
    "roberta": _bert("roberta", config={"pad_token_id": 1, "bos_token_id": 0}),
    "t5": Family(
        "t5",
        "block",
        mlp="layer.1.DenseReluDense",
        act="layer.1.DenseReluDense.act",
        down="layer.1.DenseReluDense.wo",
        out="layer.1.DenseReluDense",
        attn="layer.0.SelfAttention",
        z="layer.0.SelfAttention.o",
        mid="layer.1",
        norm="final_layer_norm",
        config={"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4},
    ),
}


def tiny_config(name: str, **changes: Any) -> PretrainedConfig:
    """The configuration of a tiny model of a family."""
    family = FAMILIES[name]
    cls = CONFIG_MAPPING[family.model_type]
    return cls(**{**COMMON, **family.config, **changes})


@lru_cache(maxsize=4)
def tiny_model(name: str) -> PreTrainedModel:
    """A base model whose weights are large enough for every module to change the output."""
    return randomised(AutoModel.from_config(tiny_config(name)))


def randomised(model: PreTrainedModel) -> PreTrainedModel:
    """Fill the model with weights from a fixed seed and put it into evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def rope_config(name: str, original: int = 24, **changes: Any) -> PretrainedConfig:
    """A configuration with "dynamic_rope" or "longrope" scaling and an original context of 24 tokens."""
    if name == "dynamic_rope":
        rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
        return tiny_config("llama", rope_parameters=rope, max_position_embeddings=original, **changes)
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": original,
        **factors,
    }
    return tiny_config("phi3", rope_parameters=rope, original_max_position_embeddings=original, **changes)


def snapshot(model: PreTrainedModel) -> dict[str, Any]:
    """All state of a model that reading activations must not change."""
    return {
        "weights": {k: x.clone() for k, x in [*model.named_parameters(), *model.named_buffers()]},
        "training": [module.training for module in model.modules()],
        "grads": [parameter.requires_grad for parameter in model.parameters()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "config": model.config.to_json_string(use_diff=False),
        "modules": [name for name, _ in model.named_modules()],
    }
