import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    Gemma3Config,
    LlamaConfig,
    LlamaModel,
)

from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.model.hook_points import resolve
from deeplens_lightning.model.isolation import relative_error
from tests.model.segments import SEGMENTS, together
from tests.support.model_families import FAMILIES, randomised, rope_config, snapshot, tiny_config, tiny_model


def reference(name: str, segment: Tensor) -> dict[str, Tensor]:
    """Every kind at layer 1, read with plain PyTorch hooks from the whole model on the segment alone."""
    model = tiny_model(name)
    base = model.get_encoder() if name == "t5" else model
    rows: dict[str, Tensor] = {}
    handles = []
    for kind, (place, scale) in FAMILIES[name].places(1).items():
        module = base.get_submodule(place.removesuffix(":in"))

        def keep(value: object, kind: str = kind, scale: float = scale) -> None:
            x = value if isinstance(value, Tensor) else value[0]
            rows[kind] = scale * x.reshape(1, len(segment), -1).clone()

        if place.endswith(":in"):
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, kwargs, keep=keep: keep(args[0] if args else kwargs["hidden_states"]),
                    with_kwargs=True,
                )
            )
        else:
            handles.append(module.register_forward_hook(lambda _, __, output, keep=keep: keep(output)))
    with torch.no_grad():
        base(input_ids=segment[None])
    for handle in handles:
        handle.remove()
    return rows


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_equal_those_of_the_untouched_model_on_each_segment_alone(name: str, tmp_path: Path) -> None:
    model, family = tiny_model(name), FAMILIES[name]
    model.save_pretrained(tmp_path)
    kinds = list(family.places(1))
    layer_kinds = [kind for kind in kinds if kind != "final_norm"]  # final_norm needs every layer
    for chosen in (layer_kinds, kinds):
        points = resolve(model.config, 1, chosen)
        frozen = FrozenModel.load(str(tmp_path), points, device="cpu")
        for segment, rows in zip(SEGMENTS, together(frozen, SEGMENTS, frozen.isolation), strict=True):
            expected = reference(name, segment)
            for kind, point in zip(chosen, points, strict=True):
                assert rows[point.name].shape[-1] == point.d_in
                assert relative_error(rows[point.name], expected[kind]).max() < 1e-5, (kind, frozen.isolation)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_residual_stream_is_the_sum_of_its_parts(name: str) -> None:
    places = FAMILIES[name].places(1)
    kinds = [k for k in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post") if k in places]
    frozen = FrozenModel.load(tiny_model(name), resolve(tiny_config(name), 1, kinds), device="cpu")
    rows = {key.rpartition(".")[2]: x for key, x in frozen.activations(SEGMENTS[1][None]).items()}
    if FAMILIES[name].post_norm:  # the norm follows the sum of the residual stream
        layer = tiny_model(name).get_submodule(f"{FAMILIES[name].layers}.1")
        rows["resid_mid"], mid = (
            layer.attention.output.LayerNorm(rows["resid_pre"] + rows["attn_out"]),
            rows["resid_mid"],
        )
        assert relative_error(rows["resid_mid"], mid).max() < 1e-5
        assert relative_error(layer.output.LayerNorm(mid + rows["mlp_out"]), rows["resid_post"]).max() < 1e-5
    elif "resid_mid" in rows:
        assert relative_error(rows["resid_pre"] + rows["attn_out"], rows["resid_mid"]).max() < 1e-5
        assert relative_error(rows["resid_mid"] + rows["mlp_out"], rows["resid_post"]).max() < 1e-5
    else:
        total = rows["resid_pre"] + rows["attn_out"] + rows["mlp_out"]
        assert relative_error(total, rows["resid_post"]).max() < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_changing_one_segment_changes_no_row_of_another(name: str) -> None:
    frozen = FrozenModel.load(tiny_model(name), resolve(tiny_config(name), 2, "resid_post"), device="cpu")
    changed = [SEGMENTS[0].flip(0), *SEGMENTS[1:3], SEGMENTS[3].flip(0)]
    before = together(frozen, SEGMENTS, frozen.isolation)
    after = together(frozen, changed, frozen.isolation)
    for index in (1, 2):
        assert relative_error(*(rows[index]["layers.2.resid_post"] for rows in (after, before))).max() < 1e-6
    assert relative_error(*(rows[0]["layers.2.resid_post"] for rows in (after, before))).max() > 1e-2


def test_later_layers_and_the_head_are_never_loaded(tmp_path: Path) -> None:
    randomised(AutoModelForCausalLM.from_config(tiny_config("llama"))).save_pretrained(tmp_path)
    frozen = FrozenModel.load(str(tmp_path), resolve(tiny_config("llama"), 0, "mlp_out"), device="cpu")
    names = {name for name, _ in frozen.base.named_parameters()}
    assert any(name.startswith("layers.0.") for name in names)
    assert not any(name.startswith(("layers.1.", "layers.2.", "lm_head")) for name in names)
    assert frozen.config.num_hidden_layers == 3


def test_layers_that_depend_on_the_depth_are_all_loaded(tmp_path: Path) -> None:
    model = tiny_model("minicpm3")  # multiplies each half by scale_depth / sqrt(num_hidden_layers)
    model.save_pretrained(tmp_path)
    frozen = FrozenModel.load(str(tmp_path), resolve(model.config, 0, "resid_post"), device="cpu")
    assert len(frozen.base.layers) == 3
    expected = model(SEGMENTS[0][None], output_hidden_states=True).hidden_states[1]
    assert relative_error(frozen.activations(SEGMENTS[0][None])["layers.0.resid_post"], expected).max() < 1e-5


def test_the_forward_pass_stops_at_the_deepest_hook_point() -> None:
    model = tiny_model("llama")
    frozen = FrozenModel.load(model, resolve(model.config, 1, ["mlp_act", "resid_pre"]), device="cpu")
    ran: list[str] = []
    handles = [
        m.register_forward_hook(lambda _, __, ___, n=n: ran.append(n)) for n, m in model.named_modules() if n
    ]
    frozen.activations(SEGMENTS[0][None])
    for handle in handles:
        handle.remove()
    assert ran[-1] == "layers.1.mlp.act_fn"
    assert not {"layers.1.mlp.up_proj", "layers.1.mlp.down_proj", "layers.2", "norm"} & set(ran)


@pytest.mark.parametrize("name", ["gpt2", "dynamic_rope", "longrope"])
def test_a_loaded_model_is_unchanged_after_close(name: str) -> None:
    config = (
        rope_config(name) if name.endswith("rope") else tiny_config(name, resid_pdrop=0.5, attn_pdrop=0.5)
    )
    model = randomised(AutoModelForCausalLM.from_config(config)).train()
    model.base_model.get_submodule(FAMILIES["gpt2" if name == "gpt2" else "llama"].layers)[1].eval()
    before = snapshot(model)
    points = resolve(model, 1, ["mlp_out", "resid_pre"])
    frozen = FrozenModel.load(model, points, device="cpu")
    first = frozen.activations(SEGMENTS[1][None])
    again = frozen.activations(SEGMENTS[1][None])
    assert all(torch.equal(x, again[key]) for key, x in first.items())
    frozen.close()
    after = snapshot(model)
    weights = before.pop("weights"), after.pop("weights")
    assert before == after
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(x, weights[1][key]) for key, x in weights[0].items())


def test_a_given_isolation_is_used_without_a_probe() -> None:
    model = tiny_model("opt")
    points = resolve(model.config, 1, "resid_post")
    assert FrozenModel.load(model, points, device="cpu").isolation != "packed"
    for mode in ("packed", "padded", "equal", "none"):
        assert FrozenModel.load(model, points, device="cpu", isolation=mode).isolation == mode


@pytest.mark.parametrize("name", FAMILIES)
def test_process_wide_state_is_neither_used_nor_changed(name: str) -> None:
    model = tiny_model(name)
    frozen = FrozenModel.load(model, resolve(model.config, 2, ["resid_post", "mlp_out"]), device="cpu")
    expected = frozen.activations(SEGMENTS[1][None])
    torch.set_default_dtype(torch.bfloat16)
    try:
        state = torch.random.get_rng_state()
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            rows = frozen.activations(SEGMENTS[1][None])
            assert torch.is_inference_mode_enabled()
            assert torch.is_autocast_enabled("cpu")
        assert torch.equal(torch.random.get_rng_state(), state)
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    for key, x in expected.items():
        assert torch.equal(rows[key], x)
        assert not rows[key].is_inference()
        assert not rows[key].requires_grad


def test_two_threads_each_get_their_own_activations() -> None:
    model = tiny_model("gpt2")
    frozen = FrozenModel.load(model, resolve(model.config, 1, ["mlp_out", "resid_post"]), device="cpu")
    expected = [frozen.activations(segment[None]) for segment in SEGMENTS]
    found: list[list[dict[str, Tensor]]] = [[], []]

    def work(which: int) -> None:
        order = SEGMENTS if which else SEGMENTS[::-1]
        for _ in range(5):
            found[which] = [frozen.activations(segment[None]) for segment in order]

    threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rows in (found[0][::-1], found[1]):
        assert all(torch.equal(a[k], b[k]) for a, b in zip(rows, expected, strict=True) for k in b)


def test_bfloat16_is_kept_and_does_not_prevent_packing() -> None:
    model = randomised(AutoModel.from_config(tiny_config("llama"))).to(torch.bfloat16)
    frozen = FrozenModel.load(model, resolve(model.config, 2, ["resid_post", "mlp_act"]), device="cpu")
    assert frozen.isolation == "packed"
    assert set(frozen.dtypes.values()) == {torch.bfloat16}
    opt = randomised(AutoModel.from_config(tiny_config("opt"))).to(torch.bfloat16)
    assert FrozenModel.load(opt, resolve(opt.config, 2, "resid_post"), device="cpu").isolation == "padded"


def test_sequences_beyond_the_models_positions_are_refused_before_loading() -> None:
    model = tiny_model("gpt2")
    with pytest.raises(ValueError, match=r"seq_length=65 exceeds the 64 positions of .*; give at most 64"):
        FrozenModel.load(model, resolve(model.config, 0, "mlp_out"), device="cpu", seq_length=65)


def test_token_ids_beyond_the_embedding_are_refused() -> None:
    model = tiny_model("gpt2")
    frozen = FrozenModel.load(model, resolve(model.config, 0, "mlp_out"), device="cpu")
    with pytest.raises(ValueError, match="token id 97 is beyond the model's embedding of 97 rows"):
        frozen.activations(torch.tensor([[1, 97]]))


def test_a_closed_model_raises_an_error() -> None:
    model = tiny_model("gpt2")
    frozen = FrozenModel.load(model, resolve(model.config, 0, "mlp_out"), device="cpu")
    frozen.close()
    with pytest.raises(RuntimeError, match="was closed"):
        frozen.activations(torch.tensor([[1, 2]]))


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaModel):
    config_class = OwnConfig


def test_a_loaded_model_of_an_unregistered_class_can_be_read() -> None:
    model = randomised(OwnModel(OwnConfig(**small())))
    points = resolve(model, 1, ["mlp_out", "resid_post"])
    frozen = FrozenModel.load(model, points, device="cpu", seq_length=64)
    expected = model(SEGMENTS[3][None], output_hidden_states=True).hidden_states[2]
    rows = frozen.activations(SEGMENTS[3][None])["layers.1.resid_post"]
    assert relative_error(rows, expected).max() < 1e-5


def small(**changes: object) -> dict[str, object]:
    text = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "intermediate_size": 48,
        "head_dim": 8,
        "vocab_size": 97,
    }
    return {**text, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, **changes}


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "gemma3"])
def test_heads_decoders_and_vision_towers_are_left_out(name: str, tmp_path: Path) -> None:
    auto = {
        "llama": AutoModelForCausalLM,
        "bert": AutoModelForMaskedLM,
        "t5": AutoModelForSeq2SeqLM,
        "gemma3": AutoModelForImageTextToText,
    }[name]
    vision = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16}
    multimodal = Gemma3Config(text_config=small(), vision_config=vision, image_token_index=96)
    model = randomised(auto.from_config(multimodal if name == "gemma3" else tiny_config(name)))
    model.save_pretrained(tmp_path)
    whole = model.get_encoder() if name == "t5" else model
    with torch.no_grad():
        expected = whole(SEGMENTS[3][None].clamp(max=95), output_hidden_states=True).hidden_states[2]
    for source in (model, str(tmp_path)):
        frozen = FrozenModel.load(source, resolve(model.config, 1, "resid_post"), device="cpu")
        rows = frozen.activations(SEGMENTS[3][None].clamp(max=95))["layers.1.resid_post"]
        assert relative_error(rows, expected).max() < 1e-5
    layers = frozen.base.get_submodule(resolve(model.config, 1, "resid_post")[0].module.rpartition(".")[0])
    assert len(layers) == 2
