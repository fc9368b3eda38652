"""Devices by name: a CUDA device always has an index, which `torch.cuda.set_device` requires."""

import pytest
import torch

from deeplens_lightning.devices import device_of, on_device


@pytest.mark.parametrize("name", ["auto", "cuda", torch.device("cuda")])
def test_a_cuda_device_has_the_index_of_the_current_one(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert device_of(name) == torch.device("cuda", 1)
    assert device_of("cuda:0") == torch.device("cuda", 0)


def test_without_an_accelerator_auto_is_the_cpu():
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("this machine has an accelerator")
    assert device_of("auto") == torch.device("cpu")


def test_a_tensor_that_is_on_the_device_is_not_copied():
    x = torch.zeros(3)
    assert on_device(x, torch.device("cpu")) is x
