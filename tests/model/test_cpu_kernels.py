"""Faster kernels give the same values and leave the modules unchanged."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn
from transformers.activations import FastGELUActivation, NewGELUActivation

from deeplens_lightning.model.cpu_kernels import faster, linear, replaceable
from deeplens_lightning.model.isolation import relative_error
from tests.support.model_families import tiny_model


@pytest.mark.parametrize("kind", [NewGELUActivation, FastGELUActivation])
def test_the_tanh_gelu_kernel_equals_the_composed_gelu(kind: type[nn.Module]) -> None:
    module = kind()
    tails = torch.linspace(-40, 40, 64_000)[torch.randperm(64_000)].view(-1, 64)
    x = torch.cat([torch.randn(1000, 64) * 3, tails])
    expected = module(x)
    with faster(replaceable(module)):
        found = module(x)
    assert relative_error(found, expected).max() < 1e-6


@pytest.mark.parametrize("shape", [(7,), (5, 3), (1, 2, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_gives_the_same_values(shape: tuple[int, ...], bias: bool) -> None:
    module = nn.Linear(48, 96, bias=bias)
    x = torch.randn(*shape, 96)[..., ::2]
    with torch.no_grad():
        expected = module(x)
        with faster(replaceable(module)):
            found = module(x)
        assert found.shape == expected.shape
        assert relative_error(found.view(-1, 96), expected.view(-1, 96)).max() < 1e-6
        in_double = linear(x.double(), module.weight.double(), None)
        assert torch.equal(in_double, x.double() @ module.weight.double().T)


def test_gradients_equal_those_of_the_plain_layer() -> None:
    module, x = nn.Linear(48, 96), torch.randn(5, 48)
    expected = torch.autograd.grad(module(x).square().sum(), module.weight)[0]
    with faster(replaceable(module)):
        found = torch.autograd.grad(module(x).square().sum(), module.weight)[0]
    assert torch.equal(found, expected)


def test_hooks_still_run_and_no_module_keeps_the_fast_forward() -> None:
    model = tiny_model("gpt2")
    found = replaceable(model)
    assert any(isinstance(module, NewGELUActivation) for module in found)
    seen = []
    handle = found[0].register_forward_hook(lambda module, _, __: seen.append(module))
    with torch.no_grad(), faster(found):
        model(torch.arange(5)[None])
    handle.remove()
    assert seen == [found[0]]
    assert not any("forward" in vars(module) for module in model.modules())


def test_modules_in_lower_precision_or_with_a_replaced_forward_are_left_alone() -> None:
    assert replaceable(deepcopy(tiny_model("gpt2")).bfloat16()) == []
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    own = model[0].forward
    model[0].forward = lambda x: own(x) + 1
    assert replaceable(model) == [model[1]]


def test_modules_on_another_device_are_left_alone() -> None:
    assert replaceable(nn.Linear(4, 4)) != []
    assert replaceable(nn.Linear(4, 4, device="meta")) == []
