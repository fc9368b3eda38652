"""An accelerator without data, for tests on a CPU: what would wait for it or mix devices on a real one raises an error.

Torch lets Python register a device (`privateuseone`), and fake tensors carry shapes, dtypes and devices without data. In
`fake_accelerator()`

- a tensor of another device raises `FakeTensorDeviceMismatchError`, as on CUDA;
- reading a value on the host (`.item()`, `bool(tensor)`, `.tolist()`) raises `DataDependentOutputException`, and a shape
  that depends on values (`nonzero`, a boolean mask) `DynamicOutputShapeException`; on CUDA both wait for the device.

`refuse_copies()` inside it makes copies between host and device an error, which wait too unless they are pinned and
asynchronous. `refuse_float64()` makes float64 an error, as MPS does.

    @forked
    def test_a_step_does_not_wait():
        with fake_accelerator() as device:
            sae = moved(SparseAutoencoder(d_in=64, d_sae=1024, k=8), device)
            rows = torch.randn(256, 64, device=device)
            with refuse_copies(), refuse_float64():
                sae.step(rows).loss.backward()

It finds no fault of streams, pinned memory, kernels or rounding.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from tests.support.ranks import launch

NAME = "fakeacc"
M = TypeVar("M", bound=nn.Module)
P = ParamSpec("P")
_registered = False


class WaitsError(RuntimeError):
    """A copy between host and device makes them wait for each other."""


class _Mode(FakeTensorMode):
    # Otherwise it computes copies of constants to the device, which has no kernels for that.
    avoid_device_init = True


def forked(test: Callable[P, None]) -> Callable[P, None]:
    """Run a test in a process of its own: the device stays registered there, and would change other tests."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        launch(1, lambda rank, ranks: test(*args, **kwargs))

    return run


@contextmanager
def fake_accelerator() -> Iterator[torch.device]:
    """Yield a device whose tensors, inside the context, have a shape, a dtype and a device but no data.

    Raises:
        RuntimeError: the test is not `forked`.
    """
    global _registered
    if multiprocessing.parent_process() is None:
        raise RuntimeError("decorate this test with @forked, because the process keeps the device")
    if not _registered:
        _setup_privateuseone_for_python_backend(NAME)
        _registered = True
    # One thread: autograd has none for a device that is registered after the first backward pass of the process.
    with _Mode(allow_non_fake_inputs=True), torch.autograd.set_multithreading_enabled(False):
        yield torch.device(NAME, 0)


def moved(module: M, device: torch.device) -> M:
    """Replace the parameters and buffers of `module` by fake ones on `device`, which `.to()` cannot do to real ones."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(torch.empty_like(parameter, device=device))
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty_like(buffer, device=device)
    return module


class _RefuseCopies(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = [x.device for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        result = func(*args, **kwargs)
        copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        after = [x.device for x in tree_leaves(result) if isinstance(x, Tensor)]
        asynchronous = kwargs.get("non_blocking", False) or (
            func._schema.name == "aten::copy_" and args[2:] == (True,)
        )
        if copies and len({device.type for device in before + after}) > 1 and not asynchronous:
            raise WaitsError(f"{func} copies from {before[-1]} to {after[0]} and waits for it")
        return result


def refuse_copies() -> TorchDispatchMode:
    """A context in which a copy between host and device raises `WaitsError`, unless it is asynchronous."""
    return _RefuseCopies()


class _RefuseFloat64(TorchDispatchMode):
    def __init__(self, on_host: bool) -> None:
        super().__init__()
        self.on_host = on_host

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if (
                isinstance(x, Tensor)
                and x.dtype == torch.float64
                and (self.on_host or x.device.type != "cpu")
            ):
                raise TypeError(f"{func} makes a float64 tensor on {x.device}, which has no float64")
        return result


def refuse_float64(*, on_host: bool = False) -> TorchDispatchMode:
    """A context in which an operation that makes a float64 tensor raises TypeError, as on MPS.

    Args:
        on_host: refuse it on the CPU too. Without it the CPU has float64, as next to a real MPS device.
    """
    return _RefuseFloat64(on_host)
