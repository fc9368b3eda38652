"""When Triton kernels are used, and their results in Triton's interpreter."""

import os
import re
import runpy
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


needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason='pip install -e ".[kernels]"')


@needs_triton
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


@needs_triton
def test_kernels_compile_for_a_gpu_and_use_no_atomics(tmp_path, monkeypatch):
    """The launches are the real ones, on a driver that names a GPU and has none: they compile and do not run."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from deeplens_lightning.sae.triton_kernels import bag_sum, jump_relu_gradients, step_gradient

    target = GPUTarget("cuda", 90, 32)
    gpu = SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
    )
    compiled = []

    def compile_only(kernel, grid):
        return lambda *args, **options: compiled.append(kernel.run(*args, grid=grid, warmup=True, **options))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(JITFunction, "__getitem__", compile_only)
    monkeypatch.setattr(type(driver), "active", gpu)
    table, values = torch.ones(9, 300).bfloat16(), torch.ones(4).bfloat16().requires_grad_()
    bag_sum(torch.arange(4), table, torch.tensor([0, 1, 4]), values).sum().backward()
    pre, threshold = torch.ones(3, 16).bfloat16(), torch.ones(16)
    jump_relu_gradients(pre, pre, threshold, 0.1, to_input=True)
    step_gradient(pre, pre, threshold, 0.1)
    assert [kernel.name for kernel in compiled] == [
        "_bag_sum_kernel",
        "_bag_dot_kernel",
        "_jump_relu_kernel",
        "_jump_relu_kernel",
    ]
    for kernel in compiled:
        assert not re.search(r"\b(atom|red)\.", kernel.asm["ptx"])


def on_cuda(dtype: torch.dtype) -> SimpleNamespace:
    """What the choice reads of a tensor on CUDA, where no such device is at hand."""
    return SimpleNamespace(is_cuda=True, dtype=dtype)


@pytest.mark.parametrize("missing", [[], ["Triton"]])
def test_other_devices_than_cuda_and_float64_use_torch_and_say_nothing(missing, monkeypatch):
    monkeypatch.setattr(kernel_choice, "MISSING", missing)
    assert not uses_triton(torch.ones(2))
    assert not uses_triton(torch.ones(2, device="meta"))
    assert not uses_triton(on_cuda(torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_uses_triton_or_a_warning_says_what_is_missing(dtype, monkeypatch):
    monkeypatch.setattr(kernel_choice, "MISSING", [])
    assert uses_triton(on_cuda(dtype))
    monkeypatch.setattr(kernel_choice, "MISSING", ["a C compiler"])
    with pytest.warns(UserWarning, match="this is missing: a C compiler"):
        assert not uses_triton(on_cuda(dtype))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_benchmark_says_what_it_needs_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sparse_kernels.py"])
    with pytest.raises(SystemExit, match="no CUDA device was found"):
        runpy.run_path(str(ROOT / "examples" / "benchmarks" / "sparse_kernels.py"), run_name="__main__")
