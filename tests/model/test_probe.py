"""The probe goes past the lengths in a model's configuration, and finds small errors in lower precision."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from deeplens_lightning.model import exact_copy, frozen
from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.model.hook_points import resolve
from deeplens_lightning.model.isolation import choose, relative_error
from deeplens_lightning.model.lengths import lengths_of
from tests.model.segments import segment, together
from tests.support.model_families import randomised, rope_config, snapshot
from tests.support.rare_families import any_config

BLOCK = 64
LATE = ("llama4", "doge", "longrope")


def model_of(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return randomised(AutoModel.from_config(config)).to(dtype)


def config_of(name: str) -> PretrainedConfig:
    """A model that computes otherwise from 44 tokens on, which only blocks longer than that reach."""
    if name.endswith("rope"):
        return rope_config(name, original=44)
    return any_config(name, **{"llama4": {"floor_scale": 44}, "doge": {"keep_window_size": 44}}[name])


def opened(model: PreTrainedModel, block: int = BLOCK) -> FrozenModel:
    return FrozenModel.load(model, resolve(model, 2, "resid_post"), device="cpu", seq_length=block)


def worst_error(read: FrozenModel, model: PreTrainedModel, block: int = BLOCK) -> float:
    """The largest relative error of rows in blocks with some segments, against each segment alone."""
    errors = []
    for lengths in ((block,), (3, block - 3), (block // 3, 2, block // 2), (block - 9, 9)):
        segments = [segment(length) for length in lengths]
        for rows, alone in zip(together(read, segments, read.isolation), segments, strict=True):
            with torch.no_grad():
                expected = model(alone[None], use_cache=False, output_hidden_states=True).hidden_states[3]
            errors.append(float(relative_error(rows["layers.2.resid_post"], expected).max()))
    return max(errors)


def without_last_norm(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose last hidden state is the output of the last layer."""
    model = copy.deepcopy(model)
    model.norm = nn.Identity()
    return model


@pytest.mark.parametrize("name", LATE)
def test_a_length_that_only_long_blocks_reach_is_probed(name: str) -> None:
    model = model_of(config_of(name))
    read = opened(model)
    assert read.isolation != "packed"
    assert worst_error(read, without_last_norm(model)) < 1e-5
    assert opened(model, 43).isolation == "packed"
    assert worst_error(opened(model, 43), without_last_norm(model), 43) < 1e-5


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_a_window_that_blocks_go_past_does_not_prevent_packing(name: str) -> None:
    model = model_of(any_config(name, sliding_window=44))
    assert opened(model).isolation == "packed"
    assert worst_error(opened(model), without_last_norm(model)) < 1e-5


@pytest.mark.parametrize("name", [*LATE, "dynamic_rope", "qwen3_next", "opt", "bert"])
def test_bfloat16_gives_the_isolation_of_float32(name: str) -> None:
    config = config_of(name) if name in (*LATE, "dynamic_rope") else any_config(name)
    allowed = {
        opened(model_of(config)).isolation,
        "padded" if name == "doge" else "",
    }  # rounding decides ties in Doge
    assert "packed" not in allowed
    assert opened(model_of(config, torch.bfloat16)).isolation in allowed


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "gemma3", "mixtral"])
def test_lower_precision_does_not_prevent_packing_and_the_model_is_only_read(name: str) -> None:
    model = model_of(any_config(name), torch.bfloat16)
    before = snapshot(model)
    assert opened(model).isolation == "packed"
    after = snapshot(model)
    weights = before.pop("weights"), after.pop("weights")
    assert before == after
    assert all(
        x.dtype == weights[1][key].dtype and torch.equal(x, weights[1][key]) for key, x in weights[0].items()
    )


def leak(_: nn.Module, __: object, output: Tensor) -> Tensor:
    """Add a little of each token's row to the next one, across segments."""
    return output + 4e-3 * nn.functional.pad(output, (0, 0, 1, 0))[:, :-1]


@pytest.mark.parametrize(
    ("dtype", "shared_embedding"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False)],
)
def test_a_leak_of_4e_3_is_found(
    dtype: torch.dtype, shared_embedding: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shared_embedding:
        monkeypatch.setattr(exact_copy, "_LARGE_EMBEDDING", 50)
    model = model_of(any_config("llama"), dtype)
    assert opened(model).isolation == "packed"
    model.layers[0].register_forward_hook(leak)
    assert opened(model).isolation == "padded"


def test_only_the_first_layer_of_each_kind_is_copied() -> None:
    kinds = [
        "sliding_attention",
        "sliding_attention",
        "sliding_attention",
        "full_attention",
        "full_attention",
    ]
    config = any_config("gemma3", num_hidden_layers=5, layer_types=kinds)
    model = model_of(config, torch.bfloat16)
    for hook, layer, layers in (("mlp_out", 2, 2), ("mlp_out", 4, 4), ("final_norm", None, 4)):
        read = FrozenModel.load(model, resolve(model, layer, hook), device="cpu", isolation="packed")
        exact = exact_copy.exact_forward(read._open_forward(), model)
        copied = [type(module).__name__ for module in exact.base.layers]
        assert copied == ["Gemma3DecoderLayer"] * layers
        assert {x.dtype for x in exact.base.layers.parameters()} == {torch.float32}


def test_the_copy_is_in_float64_where_products_in_float32_may_be_rounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    model = model_of(any_config("mixtral"), torch.bfloat16)
    read = opened(model)
    exact = exact_copy.exact_forward(read._open_forward(), model)
    assert {x.dtype for x in exact.base.parameters()} == {torch.float64}
    assert read.isolation == "packed"


@pytest.mark.parametrize(("name", "expected"), [("llama", "packed"), ("opt", "padded")])
def test_a_model_whose_weights_cannot_be_copied_is_probed_with_other_weights(
    name: str, expected: str
) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = model_of(any_config(name), torch.bfloat16)
    parts = {path: "cpu" for path, _ in model.named_children()}
    accelerate.dispatch_model(model, parts, force_hooks=True)
    assert opened(model).isolation == expected


def test_a_model_that_cannot_be_probed_in_float32_gets_segments_of_equal_length(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def only_bfloat16(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0].dtype != torch.bfloat16:
            raise TypeError("this kernel takes bfloat16")

    model = model_of(any_config("llama"), torch.bfloat16)
    model.layers[0].mlp.register_forward_pre_hook(only_bfloat16)
    assert opened(model).isolation == "equal"
    assert "could be probed in float32 (this kernel takes bfloat16)" in caplog.text


def test_a_length_that_is_too_long_to_probe_gives_segments_of_equal_length(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(frozen, "LONGEST_PROBED", 40)
    model = model_of(any_config("mistral", sliding_window=44))
    assert opened(model).isolation == "equal"
    assert "reach sliding_window=44 of the model" in caplog.text
    assert opened(model, 43).isolation == "packed"


@pytest.mark.parametrize(
    ("name", "changes", "lengths"),
    [
        ("gpt2", {}, set()),
        ("mistral", {}, {8}),
        ("gpt_neo", {}, {8}),
        ("llama4", {"floor_scale": 40, "attention_chunk_size": 32}, {40, 32}),
        ("doge", {"keep_window_size": 20, "sliding_window": None}, {20}),
        ("bert", {"attention_window": [4, 6]}, {4, 6}),
        ("qwen2", {"max_window_layers": 2, "sliding_window": 16, "use_sliding_window": True}, {16}),
    ],
)
def test_lengths_are_found_by_their_names(name: str, changes: dict[str, object], lengths: set[int]) -> None:
    config = any_config(name, **changes)
    assert {length for _, length in lengths_of(config, 64)} == lengths
    assert {length for _, length in lengths_of(config, max(lengths, default=64) - 1)} < (lengths or {64})
    assert {length for _, length in lengths_of(rope_config("longrope"), 25)} == {24}
    assert not lengths_of(rope_config("dynamic_rope"), 24)


@pytest.mark.parametrize("block", [1, 3, 8, 20])
def test_blocks_of_any_size_can_be_probed(block: int) -> None:
    model = model_of(any_config("opt", max_position_embeddings=max(block, 2)))
    assert opened(model, block).isolation == ("packed" if block == 1 else "padded")


def test_a_row_of_nan_does_not_hide_the_other_rows_in_lower_precision() -> None:
    def run(tokens: Tensor, position_ids: Tensor | None = None, attention_mask: Tensor | None = None) -> Any:
        x = tokens[..., None].float() + 1
        packed = position_ids is not None
        if packed:
            x = x * 3
            x[:, 0] = torch.nan
        return {"resid": x.to(torch.float16)}

    assert choose(run, vocab_size=500, block=64, exact=False) != "packed"
