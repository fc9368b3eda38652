"""Models that are given inside a wrapper, of `torch.compile` or like PEFT's, are read inside it and left as they are."""

import copy
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from deeplens_lightning.datamodule import ActivationDataModule
from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.model.hook_points import resolve
from deeplens_lightning.model.inspection import inspect_model
from deeplens_lightning.model.isolation import relative_error
from deeplens_lightning.model.pretrained import max_positions
from deeplens_lightning.model.single_text import TextActivations
from deeplens_lightning.model.wrappers import unwrapped
from tests.model.segments import SEGMENTS
from tests.support.model_families import randomised, snapshot, tiny_config

HOOKS = ["mlp_act", "mlp_post", "mlp_out", "attn_z", "resid_post"]


class LoraLinear(nn.Module):
    """A linear layer with a low-rank adapter, with the names of PEFT's."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        d_out, d_in = base_layer.weight.shape
        generator = torch.Generator().manual_seed(d_in)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(d_in, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, d_out, bias=False)})
        for part in (self.lora_A["default"], self.lora_B["default"]):
            nn.init.normal_(part.weight, 0, 0.2, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class Forwarding(nn.Module):
    """A wrapper that forwards unknown attributes to the model inside, as PEFT's two layers of wrappers do."""

    def __init__(self, **inside: nn.Module) -> None:
        super().__init__()
        self._modules.update(inside)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(next(iter(self._modules.values())), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return next(iter(self._modules.values()))(*args, **kwargs)


def causal(**changes: Any) -> PreTrainedModel:
    return randomised(AutoModelForCausalLM.from_config(tiny_config("llama", **changes)))


def with_adapters(model: PreTrainedModel) -> nn.Module:
    """The model with adapters in some of its linear layers, in wrappers of the shape of `PeftModel`."""
    for layer in model.model.layers:
        layer.mlp.down_proj = LoraLinear(layer.mlp.down_proj)
        layer.self_attn.q_proj = LoraLinear(layer.self_attn.q_proj)
    return Forwarding(base_model=Forwarding(model=model))


def merged(wrapper: nn.Module) -> PreTrainedModel:
    """A copy without wrappers, whose weights include the adapters."""
    model = copy.deepcopy(unwrapped(wrapper))
    for path, module in list(model.named_modules()):
        if isinstance(module, LoraLinear):
            delta = module.lora_B["default"].weight @ module.lora_A["default"].weight
            module.base_layer.weight.data += delta
            model.set_submodule(path, module.base_layer)
    return model


def rows(model: nn.Module) -> dict[str, Tensor]:
    read = FrozenModel.load(model, resolve(model, 1, HOOKS), device="cpu", seq_length=40)
    assert read.isolation == "packed"
    return read.activations(SEGMENTS[1][None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_include_adapters_and_the_wrapper_is_left_as_it_was(dtype: torch.dtype) -> None:
    wrapper = with_adapters(causal()).to(dtype)
    before = snapshot(wrapper)
    found = rows(wrapper)
    after = snapshot(wrapper)
    weights = before.pop("weights"), after.pop("weights")
    assert before == after
    assert all(torch.equal(x, weights[1][key]) for key, x in weights[0].items())
    expected, plain = rows(merged(wrapper)), rows(causal().to(dtype))
    for key, x in expected.items():
        assert relative_error(found[key], x).max() < (1e-5 if dtype == torch.float32 else 0.1)
        assert relative_error(plain[key], x).max() > 0.1


def test_adapters_of_the_peft_library_are_included() -> None:
    peft = pytest.importorskip("peft")
    wrapper = peft.get_peft_model(
        causal(), peft.LoraConfig(target_modules=["down_proj", "q_proj"], init_lora_weights=False)
    ).eval()
    found = rows(wrapper)
    expected = rows(copy.deepcopy(wrapper).merge_and_unload())
    assert all(relative_error(found[key], x).max() < 1e-5 for key, x in expected.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_model_is_read_without_its_compiled_calls(dtype: torch.dtype) -> None:
    expected = rows(causal().to(dtype))
    whole, in_place, by_layer = (causal().to(dtype) for _ in range(3))
    in_place.model.compile(backend="eager")
    for index, layer in enumerate(in_place.model.layers):
        layer.compile(backend="eager")
        by_layer.model.layers[index] = torch.compile(by_layer.model.layers[index], backend="eager")
    for model in (torch.compile(whole, backend="eager"), in_place, by_layer):
        modules = [(module, module._compiled_call_impl) for module in model.modules()]
        found = rows(model)
        assert all(torch.equal(found[key], x) for key, x in expected.items())
        assert [(module, module._compiled_call_impl) for module in model.modules()] == modules


def test_a_wrapped_model_can_be_inspected_and_read_text_by_text() -> None:
    wrapper = torch.compile(with_adapters(causal()), backend="eager")
    assert inspect_model(wrapper, 1, "mlp_out").family == "llama"
    assert max_positions(wrapper) == 64
    reader = TextActivations(wrapper, tokenizer=object())
    [point] = resolve(wrapper, 1, "mlp_out")
    expected = rows(wrapper)["layers.1.mlp_out"]
    found = reader.rows(SEGMENTS[1].tolist(), [point])["layers.1.mlp_out"]
    assert relative_error(found, expected).max() < 1e-5


def test_a_data_module_serves_the_rows_of_a_wrapped_model() -> None:
    ids = datasets.Dataset.from_dict({"ids": [part.tolist() for part in SEGMENTS]})
    found: list[Tensor] = []
    for model in (
        with_adapters(causal()),
        torch.compile(with_adapters(causal()), backend="eager"),
        merged(with_adapters(causal())),
    ):
        data = ActivationDataModule(
            model, layer=1, hook="mlp_out", dataset_name=ids, text_column="ids", seq_length=40, batch_size=8,
            val_fraction=0, device="cpu",
        )  # fmt: skip
        data.setup("fit")
        found.append(torch.cat(list(data.train_dataloader())))
        data.teardown("fit")
    assert torch.equal(found[0], found[1])
    assert relative_error(found[0], found[2]).max() < 1e-5


def test_a_wrapper_with_weights_around_the_model_is_refused() -> None:
    wrapper = Forwarding(base_model=causal())
    wrapper.prompt_encoder = nn.Embedding(4, 32)
    with pytest.raises(ValueError, match=r"a Forwarding with weights around .*'prompt_encoder.weight'"):
        FrozenModel.load(wrapper, resolve(causal(), 1, HOOKS), device="cpu")
    with pytest.raises(TypeError, match="hf_model is a Linear with no Hugging Face model in it"):
        unwrapped(nn.Linear(2, 2))
