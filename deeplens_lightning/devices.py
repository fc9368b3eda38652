"""Choose devices by name, and copy tensors and rows.

Plain torch and NumPy. This module imports no other module of the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def device_of(name: str | torch.device) -> torch.device:
    """Turn a name into a device: "auto" is CUDA, else MPS, else the CPU; "cuda" is the current CUDA device.

    Raises:
        ValueError: the device is not there, as in `check_device`.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = name if isinstance(name, torch.device) else check_device(name)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def check_device(name: str, setting: str = "device") -> torch.device:
    """Check that the device of a name is there; CUDA is not initialised. "auto" is returned as the CPU.

    Args:
        name: `cpu`, `cuda`, `cuda:1`, `mps`, `auto`, or another kind of device that torch knows.
        setting: the setting that has this value, for the message.

    Raises:
        ValueError: torch does not know the name, or finds no such CUDA or MPS device.
    """
    if name in ("auto", "cpu"):
        return torch.device("cpu")
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is not None and (device.type not in counts or (device.index or 0) < counts[device.type]):
        return device
    there = ["cpu", *(f"cuda:{index}" for index in range(counts["cuda"])), *["mps"] * counts["mps"]]
    without = device is not None and device.type == "cuda" and torch.version.cuda is None
    reason = f"; torch {torch.__version__} was built without CUDA" if without else ""
    raise ValueError(
        f"{setting}={name!r}: there is no such device here; give one of {', '.join(there)}, auto{reason}"
    )


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device. From the CPU to CUDA it goes through pinned memory, so that the CPU does not wait."""
    if x.device.type != "cpu" or device.type in ("cpu", "mps"):
        return x.to(device)
    pinned = x.pin_memory() if device.type == "cuda" and not x.is_pinned() else x
    return pinned.to(device, non_blocking=True)


def empty_rows(rows: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor `(rows, *shape)` on the CPU, in huge pages where the system has them.

    NumPy asks the system for huge pages and torch does not. Without them, the first write to fresh memory, which a tensor
    of 32 MB and more always gets, takes three times the time.
    """
    return torch.from_numpy(np.empty((rows, *shape), f"i{dtype.itemsize}")).view(dtype)


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Copy some rows of a tensor to a new one on the same device.

    Args:
        x: `(n, ...)`.
        rows: numbers of rows, int64 `(m,)` on the CPU.

    Returns:
        `(m, ...)`.
    """
    if x.device.type != "cpu":
        return x.index_select(0, on_device(rows, x.device))
    return torch.index_select(x, 0, rows, out=empty_rows(len(rows), x.shape[1:], x.dtype))


def move_rows(x: Tensor, rows: Tensor, target: Tensor, places: Tensor) -> None:
    """Copy some rows of a tensor to some rows of another tensor.

    On the CPU each row is copied once, in the calling thread: as fast as two threads of `index_select` and `index_copy_`,
    and it does not wait for a core that another thread of ours is busy on.

    Args:
        x: `(n, ...)`.
        rows: numbers of rows of `x`, ascending, int64 `(m,)` on the CPU.
        target: `(k + 1, ...)`, in the dtype of `x`. The last row has no defined values afterwards.
        places: numbers of rows of `target`, int64 `(m,)` on the CPU; row `rows[i]` is copied to row `places[i]`.

    Raises:
        TypeError: the dtypes differ.
    """
    if x.dtype != target.dtype:
        raise TypeError(f"rows of {x.dtype} cannot be copied to rows of {target.dtype}")
    if x.device.type == target.device.type == "cpu":
        first, end = int(rows[0]), int(rows[-1]) + 1
        into = np.full(end - first, len(target) - 1)
        into[rows.numpy() - first] = places.numpy()
        _as_array(target)[into] = _as_array(x[first:end])
    else:
        chosen = x.index_select(0, on_device(rows, x.device))
        target.index_copy_(0, on_device(places, target.device), on_device(chosen, target.device))


def _as_array(x: Tensor) -> NDArray[Any]:
    """A CPU tensor as an array of integers of the same size, because NumPy has no bfloat16."""
    return x.view(_INTEGERS[x.element_size()]).numpy()
