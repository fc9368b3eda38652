"""Devices by name: one that is not there is named at once, CUDA has an index; rows are copied bit for bit."""

import pytest
import torch

from deeplens_lightning import ActivationDataModule, ActivationExtractor, ExtractSingleSample, FromHuggingFace
from deeplens_lightning.callbacks import LossRecovered
from deeplens_lightning.devices import check_device, device_of, gather_rows, move_rows, on_device
from deeplens_lightning.options import BufferOptions


@pytest.mark.parametrize("name", ["auto", "cuda", torch.device("cuda")])
def test_a_cuda_device_has_the_index_of_the_current_one(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
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


TAKERS = {
    "ActivationDataModule": lambda device: ActivationDataModule(device=device),
    "BufferOptions": lambda device: ActivationDataModule(buffer_options=BufferOptions(device=device)),
    "FromHuggingFace": lambda device: FromHuggingFace("demo:lm", 3, ["a text"], device=device),
    "ExtractSingleSample": lambda device: ExtractSingleSample("demo:lm", device=device),
    "ActivationExtractor": lambda device: ActivationExtractor("demo:lm", device=device),
    "LossRecovered": lambda device: LossRecovered(device=device),
}


@pytest.mark.parametrize("taker", TAKERS)
def test_a_device_that_is_not_there_is_one_sentence_at_once(taker):
    for name in ("gpu", "cuda:7"):
        with pytest.raises(
            ValueError, match=rf"device='{name}': there is no such device here; give one of cpu, .*auto"
        ):
            TAKERS[taker](name)


def test_a_torch_without_cuda_is_named():
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    with pytest.raises(ValueError, match=r"give one of cpu, .*auto; torch .* was built without CUDA"):
        check_device("cuda")


def test_checking_a_device_does_not_initialise_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", None)
    assert check_device("cuda:1") == torch.device("cuda", 1)
    assert check_device("cuda") == torch.device("cuda")
    assert check_device("auto") == check_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="give one of cpu, cuda:0, cuda:1, auto"):
        check_device("cuda:2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.bool])
@pytest.mark.parametrize("contiguous", [True, False])
def test_rows_are_copied_bit_for_bit(dtype, contiguous):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 14, generator=generator).to(dtype)
    x = x[:, :7] if contiguous is False else x[:, :7].contiguous()
    rows = torch.randperm(200, generator=generator)[:50].sort().values
    places = torch.randperm(80, generator=generator)[:50]
    before = torch.randn(81, 7, generator=generator).to(dtype)
    target, expected = before.clone(), before.clone()
    move_rows(x, rows, target, places)
    expected[places] = x[rows]
    assert torch.equal(target[:-1], expected[:-1])
    assert torch.equal(gather_rows(x, rows), x[rows])


def test_rows_of_another_dtype_are_refused_and_not_reinterpreted():
    with pytest.raises(TypeError, match=r"rows of torch.float16 cannot be copied to rows of torch.bfloat16"):
        move_rows(
            torch.zeros(4, 2, dtype=torch.float16),
            torch.arange(2),
            torch.zeros(5, 2, dtype=torch.bfloat16),
            torch.arange(2),
        )
