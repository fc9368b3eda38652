"""Splicing replaces the activations at one hook point until the context ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedModel,
)

from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.model.hook_points import resolve
from deeplens_lightning.model.splicing import spliced

TOKENS = torch.arange(2 * 9).reshape(2, 9)
LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 99,
}
CONFIGS = {
    "gpt2": GPT2Config(n_embd=32, n_layer=3, n_head=2, n_positions=32, vocab_size=99),
    "gpt_neox": GPTNeoXConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, vocab_size=99
    ),
    "llama": LlamaConfig(**LLAMA),
    "granite": GraniteConfig(**LLAMA, residual_multiplier=0.22),
    "bloom": BloomConfig(hidden_size=32, n_layer=3, n_head=2, vocab_size=99),
    "opt": OPTConfig(
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        vocab_size=99,
        word_embed_proj_dim=32,
        max_position_embeddings=32,
    ),
}
KINDS = (
    "mlp_in",
    "mlp_act",
    "mlp_post",
    "mlp_out",
    "attn_out",
    "attn_z",
    "resid_pre",
    "resid_mid",
    "resid_post",
)


def _model(family: str) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(CONFIGS[family]).eval()  # type: ignore[no-any-return]


def _places(model: PreTrainedModel) -> list[str]:
    names = [f"layers.1.{kind}" for kind in KINDS] + ["final_norm"]
    found = []
    for name in names:
        try:
            resolve(model, None, name)
        except ValueError:
            continue  # this architecture has no such hook point; test_hook_points.py checks the message
        found.append(name)
    return found


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_the_identity_function_changes_no_bit_and_other_functions_change_the_logits(family: str) -> None:
    model = _model(family)
    clean = model(TOKENS, use_cache=False).logits
    places = _places(model)
    assert len(places) >= 8
    for name in places:
        with spliced(model, name, lambda x: x.clone()):
            assert torch.equal(model(TOKENS, use_cache=False).logits, clean), name
        with spliced(model, name, lambda x: x + 1):
            assert not torch.equal(model(TOKENS, use_cache=False).logits, clean), name
        assert torch.equal(model(TOKENS, use_cache=False).logits, clean), name
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("family", ["gpt2", "llama", "granite", "opt"])
@torch.no_grad()
def test_a_vector_added_to_the_residual_stream_is_read_at_later_hook_points(family: str) -> None:
    """Adding v to the residual stream adds v to the layer's output, if its MLP adds zero."""
    model = _model(family)
    v = torch.linspace(-1, 1, 32)
    read = FrozenModel.load(
        model, resolve(model, None, "layers.1.resid_post"), device="cpu", isolation="padded"
    )

    def resid_post() -> torch.Tensor:
        return read.activations(TOKENS)["layers.1.resid_post"]

    with spliced(model, "layers.1.mlp_out", torch.zeros_like):
        clean = resid_post()
        for name in ("layers.1.attn_out", "layers.1.resid_mid", "layers.1.mlp_out", "layers.1.resid_post"):
            with spliced(model, name, lambda x: x + v):
                assert torch.allclose(resid_post(), clean + v, atol=1e-5), name


@torch.no_grad()
def test_the_function_gets_the_activations_that_the_hook_point_reads() -> None:
    model = _model("granite")
    seen = []
    read = FrozenModel.load(model, resolve(model, None, "layers.1.mlp_out"), device="cpu", isolation="padded")
    with spliced(model, "layers.1.mlp_out", lambda x: (seen.append(x), x)[1]):
        model(TOKENS, use_cache=False)
    assert torch.equal(seen[0].reshape(2, 9, 32), read.activations(TOKENS)["layers.1.mlp_out"])


def test_gradients_flow_through_the_spliced_function() -> None:
    model = _model("gpt2").requires_grad_(False)
    for name in ("layers.1.resid_mid", "layers.1.mlp_out"):
        v = torch.zeros(32, requires_grad=True)
        with spliced(model, name, lambda x, v=v: x + v):  # type: ignore[misc]
            model(TOKENS, use_cache=False).logits.square().sum().backward()
        assert v.grad is not None
        assert v.grad.abs().sum() > 0


def test_a_wrong_shape_or_an_exception_leaves_no_hook() -> None:
    model = _model("gpt2")
    message = r"layers\.1\.mlp_out must keep the shape \(2, 9, 32\)"
    with pytest.raises(ValueError, match=message), spliced(model, "layers.1.mlp_out", lambda x: x[:, :3]):
        model(TOKENS)
    assert not any(m._forward_hooks for m in model.modules())


def test_an_unknown_hook_point_is_refused() -> None:
    with pytest.raises(ValueError, match="mlp_out"), spliced(_model("gpt2"), "layers.1.mlp_aut", lambda x: x):
        pass
