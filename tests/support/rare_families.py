"""Tiny configurations of families with peculiar layers, whose module paths no test needs."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from tests.support.model_families import COMMON, FAMILIES, MOE, tiny_config

_LINEAR = {
    "head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
}
_SHARED_KV = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "head_dim": 8,
    "vocab_size_per_layer_input": 97,
    "hidden_size_per_layer_input": 8,
    "sliding_window": 8,
}
RARE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama4": (
        "llama4_text",
        {"moe_layers": [], "intermediate_size_mlp": 48, "head_dim": 8, "no_rope_layers": [1, 0, 1]},
    ),
    "doge": ("doge", {}),
    "qwen3_next": ("qwen3_next", {**MOE, **_LINEAR, "shared_expert_intermediate_size": 24}),
    "qwen3_5": ("qwen3_5_text", _LINEAR),
    "gemma3n": ("gemma3n_text", {**_SHARED_KV, "laurel_rank": 4, "altup_num_inputs": 2}),
    "gemma4": ("gemma4_text", {**_SHARED_KV, "global_head_dim": 16}),
    "big_bird": ("big_bird", {"block_size": 4, "num_random_blocks": 1}),
    "longformer": ("longformer", {"attention_window": [4] * 3}),
    "switch": (
        "switch_transformers",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4, "num_experts": 2},
    ),
}
"""Model type and configuration by name."""


def any_config(name: str, **changes: Any) -> PretrainedConfig:
    """The configuration of a tiny model of one of these families, or of `FAMILIES`."""
    if name in FAMILIES:
        return tiny_config(name, **changes)
    model_type, config = RARE[name]
    return CONFIG_MAPPING[model_type](**{**COMMON, **config, **changes})
