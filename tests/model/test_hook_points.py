import pytest
import torch
from transformers import AlbertConfig, AutoModelForCausalLM, Gemma3Config, ViTConfig

from deeplens_lightning.model.hook_points import KINDS, TRANSFORMER_LENS, HookPoint, resolve
from deeplens_lightning.model.tracing import trace
from tests.support.model_families import FAMILIES, tiny_config


def path_of(point: HookPoint) -> str:
    return point.module + (":in" if point.side == "in" else "")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_is_found_or_refused_with_its_name(name: str) -> None:
    config, places = tiny_config(name), FAMILIES[name].places(1)
    for kind in KINDS:
        if kind in places:
            (point,) = resolve(config, 1, kind)
            assert path_of(point) == places[kind][0]
            assert point.scale == pytest.approx(places[kind][1], rel=1e-12)
            assert point.name == ("final_norm" if kind == "final_norm" else f"layers.1.{kind}")
        else:
            with pytest.raises(ValueError, match=f"has no {kind}: "):
                resolve(config, 1, kind)


@pytest.mark.parametrize("name", ["gpt_neox", "falcon", "stablelm_parallel", "phi"])
def test_parallel_halves_are_the_reason_for_no_resid_mid(name: str) -> None:
    with pytest.raises(ValueError, match=r"no resid_mid: .* run in parallel.*It offers mlp_in"):
        resolve(tiny_config(name), 0, "resid_mid")


@pytest.mark.parametrize("kind", ["mlp_act", "mlp_post"])
def test_hook_points_inside_experts_are_refused_with_a_reason_and_an_alternative(kind: str) -> None:
    with pytest.raises(ValueError, match="experts, whose rows are per token and expert; take mlp_out"):
        resolve(tiny_config("mixtral"), 0, kind)


def test_layers_of_one_model_may_differ() -> None:
    config = tiny_config("deepseek_v3", first_k_dense_replace=1)
    assert resolve(config, 0, "mlp_post")[0].d_in == 48
    with pytest.raises(ValueError, match=r"layer 1 of deepseek_v3 has no mlp_post: .* experts"):
        resolve(config, 1, "mlp_post")


def test_all_names_of_a_hook_point_resolve_to_the_same_one() -> None:
    config = tiny_config("gpt2")
    for end, kind in TRANSFORMER_LENS.items():
        expected = resolve(config, 1, kind)
        assert resolve(config, None, f"layers.1.{kind}") == expected
        assert resolve(config, None, f"blocks.1.{end}") == expected
        assert resolve(config, None, f"blocks.-2.{end}") == expected
        assert resolve(config, -2, kind) == expected
    assert resolve(config, None, "ln_final") == resolve(config, None, "final_norm")
    (by_path,) = resolve(config, None, "transformer.h.1.mlp.c_proj:in")
    assert by_path.name == "h.1.mlp.c_proj:in"
    assert (by_path.module, by_path.side, by_path.d_in) == ("h.1.mlp.c_proj", "in", 128)
    assert resolve(config, None, "h.1.mlp.act:out") == resolve(config, None, "h.1.mlp.act")


def test_kinds_are_taken_at_every_layer_in_the_order_given() -> None:
    points = resolve(tiny_config("llama"), [2, 0], ["resid_post", "final_norm", "mlp_in"])
    assert [point.name for point in points] == [
        "layers.2.resid_post",
        "layers.0.resid_post",
        "final_norm",
        "layers.2.mlp_in",
        "layers.0.mlp_in",
    ]


def test_the_deepest_layer_that_has_to_run() -> None:
    hooks = ["layers.1.mlp_out", "final_norm", "embed_tokens", "model.layers.2.self_attn", "norm:in"]
    points = resolve(tiny_config("llama"), None, hooks)
    assert [point.layer for point in points] == [1, None, 0, 2, None]


def test_a_loaded_model_and_its_configuration_give_the_same_hook_points() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("gemma2"))
    hooks = ["mlp_out", "attn_z", "final_norm", "model.layers.1.mlp"]
    assert resolve(model, 1, hooks) == resolve(model.config, 1, hooks)


def test_resolving_loads_nothing_and_draws_no_random_number() -> None:
    state = torch.random.get_rng_state()
    before = torch.get_default_dtype()
    config = tiny_config("qwen2", dtype="bfloat16")
    resolve(config, 0, "mlp_out")
    assert all(parameter.is_meta for parameter in trace(config).base.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_default_dtype() == before


@pytest.mark.parametrize(
    ("family", "layer", "hook", "message"),
    [
        ("gpt2", 3, "mlp_out", r"layer 3 is out of range: .* layers 0 to 2 \(-1 to -3 count"),
        ("gpt2", -4, "mlp_out", "layer -4 is out of range"),
        ("gpt2", None, "mlp_out", "hook='mlp_out' needs a layer: give layer= a number from 0 to 2"),
        ("gpt2", 1, "mlp_ouput", "nearest: mlp_out, "),
        ("gpt2", None, "blocks.1.hook_mlp_in", "nearest: blocks.1.hook_mlp_out"),
        ("gpt2", None, "transformer.h.1.mlp.actt", "nearest: h.1.mlp.act"),
        ("gpt2", None, "h.1.mlp.act:inn", "names nothing"),
        ("gpt2", 1, ["mlp_out", "layers.1.mlp_out"], "named twice: layers.1.mlp_out"),
        ("gpt2", 1, [], "no hook point is named"),
        ("gpt2", None, "h", "is never called by itself"),
        ("gpt2", None, "wte:in", "input is no floating-point tensor with one row per token"),
        ("llama", None, "rotary_emb", "output is no floating-point tensor with one row per token"),
        ("mixtral", None, "layers.1.mlp.experts.act_fn", "output is no floating-point tensor with one row"),
        ("bert", None, "embeddings:in", "takes no positional tensor; read its output, 'embeddings'"),
        ("t5", None, "decoder.block.0", "of t5 models only the encoder is read"),
        ("bert", 1, "final_norm", "bert has no final_norm: no norm follows its last layer"),
        ("lfm2", 1, "mlp_act", "its activation function is no module of its own; take mlp_post"),
    ],
)
def test_the_error_for_a_wrong_name_says_what_to_type(
    family: str, layer: int, hook: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(tiny_config(family), layer, hook)


def test_a_layer_that_runs_many_times_has_no_rows() -> None:
    config = AlbertConfig(vocab_size=97, hidden_size=32, num_attention_heads=4, intermediate_size=48)
    with pytest.raises(ValueError, match="layer 0 runs 12 times in one forward pass"):
        resolve(config, 0, "resid_post")


def test_a_model_without_token_ids_is_refused() -> None:
    with pytest.raises(ValueError, match="'vit' models take no token ids"):
        resolve(ViTConfig(num_hidden_layers=2), 0, "mlp_out")


def test_hook_points_of_a_multimodal_model_are_in_its_language_model() -> None:
    text = {"hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48, "head_dim": 8}
    vision = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16}
    (point,) = resolve(Gemma3Config(text_config=text, vision_config=vision), -1, "mlp_out")
    assert point.module == "language_model.layers.2.post_feedforward_layernorm"
