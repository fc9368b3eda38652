"""Each supported TransformerLens name gives the activations that TransformerLens itself reads."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.model.hook_points import TRANSFORMER_LENS, resolve
from deeplens_lightning.model.isolation import relative_error
from tests.support.model_families import randomised, tiny_config

transformer_lens = pytest.importorskip("transformer_lens")
conversions = pytest.importorskip("transformer_lens.pretrained.weight_conversions")

SHAPE = {"n_layers": 3, "d_model": 32, "n_heads": 4, "n_ctx": 64, "d_vocab": 97, "eps": 1e-5}
GPT2 = {
    **SHAPE,
    "d_head": 8,
    "d_mlp": 128,
    "act_fn": "gelu_new",
    "normalization_type": "LN",
    "use_attn_scale": True,
}
GEMMA2 = {
    **SHAPE,
    "d_head": 16,
    "d_mlp": 48,
    "n_key_value_heads": 2,
    "eps": 1e-6,
    "act_fn": "gelu_pytorch_tanh",
    "normalization_type": "RMS",
    "rotary_base": 10000.0,
    "rotary_dim": 16,
    "positional_embedding_type": "rotary",
    "use_attn_scale": True,
    "window_size": 8,
    "use_local_attn": True,
    "attn_types": ["local", "global", "local"],
    "attn_scores_soft_cap": 50.0,
    "output_logits_soft_cap": 30.0,
    "gated_mlp": True,
    "final_rms": True,
    "use_normalization_before_and_after": True,
}
TOKENS = torch.randint(0, 97, (2, 23), generator=torch.Generator().manual_seed(0))


def lens(name: str, settings: dict[str, Any], model: torch.nn.Module) -> Any:
    """The model in TransformerLens, with converted but unprocessed weights."""
    cfg = transformer_lens.HookedTransformerConfig(**settings, dtype=torch.float32, device="cpu")
    hooked = transformer_lens.HookedTransformer(cfg)
    convert = {"gpt2": conversions.convert_gpt2_weights, "gemma2": conversions.convert_gemma_weights}[name]
    hooked.load_state_dict(convert(model, cfg), strict=False)
    return hooked.eval()


@pytest.mark.parametrize(
    ("name", "settings", "changes"),
    [
        ("gpt2", GPT2, {}),
        (
            "gemma2",
            GEMMA2,
            {
                "num_key_value_heads": 2,
                "query_pre_attn_scalar": 16,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
        ),
    ],
)
def test_transformer_lens_names_give_the_activations_of_transformer_lens(
    name: str, settings: dict[str, Any], changes: dict[str, Any]
) -> None:
    model = randomised(AutoModelForCausalLM.from_config(tiny_config(name, **changes)))
    hooked = lens(name, settings, model)
    finals: list[Tensor] = []
    hooked.ln_final.register_forward_hook(lambda _, __, output: finals.append(output))
    with torch.no_grad():
        _, cache = hooked.run_with_cache(TOKENS)
    names = [f"blocks.{layer}.{end}" for layer in range(3) for end in TRANSFORMER_LENS]
    frozen = FrozenModel.load(model, resolve(model, None, [*names, "ln_final"]), device="cpu")
    rows = list(frozen.activations(TOKENS).values())
    for theirs, ours in zip(names, rows, strict=False):
        assert relative_error(ours, cache[theirs].reshape(ours.shape)).max() < 1e-5, theirs
    assert relative_error(rows[-1], finals[0]).max() < 1e-5
