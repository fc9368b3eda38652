"""When Triton kernels are used, and their results in Triton's interpreter."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from deeplens_lightning.sae import kernel_choice
from deeplens_lightning.sae.kernel_choice import uses_triton

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(find_spec("triton") is None, reason='needs Triton: pip install -e ".[kernels]"')
def test_kernels_equal_their_references_in_tritons_interpreter():
    """In a process of its own, because Triton reads the variable when kernels are defined."""
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "tests/sae/interpreted_kernels.py"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout


def on_cuda(dtype: torch.dtype) -> SimpleNamespace:
    """What the choice reads of a tensor on CUDA, where no such device is at hand."""
    return SimpleNamespace(is_cuda=True, dtype=dtype)


@pytest.mark.parametrize("installed", [True, False])
def test_other_devices_than_cuda_and_float64_use_torch_and_say_nothing(installed, monkeypatch):
    monkeypatch.setattr(kernel_choice, "HAS_TRITON", installed)
    assert not uses_triton(torch.ones(2))
    assert not uses_triton(torch.ones(2, device="meta"))
    assert not uses_triton(on_cuda(torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_uses_triton_and_names_the_package_if_it_is_missing(dtype, monkeypatch):
    monkeypatch.setattr(kernel_choice, "HAS_TRITON", True)
    assert uses_triton(on_cuda(dtype))
    monkeypatch.setattr(kernel_choice, "HAS_TRITON", False)
    with pytest.warns(UserWarning, match=r"pip install .deeplens-lightning\[kernels\]"):
        assert not uses_triton(on_cuda(dtype))


def test_the_benchmark_says_what_it_needs_where_there_is_no_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        [sys.executable, "examples/benchmarks/kernels.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1
    assert "no CUDA device was found" in done.stderr
