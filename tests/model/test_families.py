"""Families that cannot be cut, that change themselves, or that cannot be read."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, PretrainedConfig, PreTrainedModel, Qwen3_5Config

from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.model.hook_points import HookPoint, resolve
from deeplens_lightning.model.isolation import relative_error
from deeplens_lightning.model.pretrained import cut
from deeplens_lightning.model.tracing import first_output
from tests.model.segments import segment, together
from tests.support.model_families import randomised, snapshot
from tests.support.rare_families import any_config


def config_of(name: str, **changes: object) -> PretrainedConfig:
    if name != "qwen3_5_multimodal":
        return any_config(name, **changes)
    vision = {"hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "depth": 1, "out_hidden_size": 32}
    text = any_config("qwen3_5", **changes).to_dict()
    return Qwen3_5Config(text_config=text, vision_config=vision, image_token_id=95, video_token_id=96)


def read_plainly(model: PreTrainedModel, point: HookPoint, tokens: Tensor) -> Tensor:
    """Rows of a hook point, read with a hook from the whole model."""
    found: list[Tensor] = []
    module = model.get_submodule(point.module)
    if point.side == "in":
        handle = module.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    else:
        handle = module.register_forward_hook(lambda _, __, output: found.append(first_output(output)))
    with torch.no_grad():
        model(input_ids=tokens[None])
    handle.remove()
    return found[0].reshape(1, -1, point.d_in)[:, : len(tokens)]


@pytest.mark.parametrize("name", ["gemma3n", "gemma4", "qwen3_5_multimodal"])
def test_every_layer_of_a_folder_can_be_read_where_the_model_cannot_be_cut(name: str, tmp_path: Path) -> None:
    config = config_of(name)
    model = randomised(AutoModel.from_config(config))
    model.save_pretrained(tmp_path)
    tokens = segment(12).clamp(max=90)
    for layer in (0, config.get_text_config().num_hidden_layers - 2):
        points = resolve(config, layer, ["mlp_in", "attn_z"])
        read = FrozenModel.load(str(tmp_path), points, device="cpu", isolation="equal")
        for point in points:
            found = read.activations(tokens[None])[point.name]
            assert relative_error(found, read_plainly(model, point, tokens)).max() < 1e-5, point


def test_a_model_is_cut_after_the_first_layer_of_each_kind_where_it_needs_one() -> None:
    kinds = ["linear_attention", "linear_attention", "full_attention"]
    config = config_of("qwen3_5_multimodal", num_hidden_layers=9, layer_types=3 * kinds)
    depths = [cut(config, [layer]).get_text_config().num_hidden_layers for layer in (0, 2, 3)]
    assert depths == [3, 3, 4]


def test_big_bird_is_left_as_it_was_and_every_text_is_read_as_if_it_were_the_first() -> None:
    model = randomised(AutoModel.from_config(any_config("big_bird")))
    before, state = snapshot(model), torch.random.get_rng_state()
    children = list(model.modules())
    points = resolve(model, 1, "resid_post")
    read = FrozenModel.load(model, points, device="cpu", seq_length=64)
    assert read.isolation == "equal"  # of 28 tokens and fewer the attention is not sparse
    for length in (40, 20, 60, 28, 9, 40):
        tokens = segment(length)
        with torch.random.fork_rng():
            expected = read_plainly(copy.deepcopy(model), points[0], tokens)
        [rows] = together(read, [tokens], read.isolation)
        assert relative_error(rows["layers.1.resid_post"], expected).max() < 1e-5, length
    after = snapshot(model)
    weights = before.pop("weights"), after.pop("weights")
    assert before == after
    assert all(torch.equal(x, weights[1][key]) for key, x in weights[0].items())
    assert all(a is b for a, b in zip(children, model.modules(), strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "family"), [("longformer", "longformer"), ("switch", "switch_transformers")]
)
def test_models_whose_modules_do_not_compute_every_token_are_refused(name: str, family: str) -> None:
    with pytest.raises(
        ValueError, match=rf"'{family}' models are not supported: most likely, which tokens .* depends on"
    ):
        resolve(any_config(name), 1, "resid_post")


def test_a_module_that_does_not_run_is_named() -> None:
    model = randomised(AutoModel.from_config(any_config("gpt2")))
    model.h[1].mlp.forward = lambda x: x
    with pytest.raises(RuntimeError, match=r"did not reach layers\.1\.mlp_act"):
        FrozenModel.load(model, resolve(model, 1, "mlp_act"), device="cpu", isolation="packed")
