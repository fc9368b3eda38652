"""Choose devices by name, and copy tensors to them.

Plain torch. This module imports no other module of the package.
"""

from __future__ import annotations

import torch
from torch import Tensor


def device_of(name: str | torch.device) -> torch.device:
    """Turn a name into a device: "auto" is CUDA, else MPS, else the CPU; "cuda" is the current CUDA device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device. From the CPU to CUDA it goes through pinned memory, so that the CPU does not wait."""
    if x.device.type != "cpu" or device.type in ("cpu", "mps"):
        return x.to(device)
    pinned = x.pin_memory() if device.type == "cuda" and not x.is_pinned() else x
    return pinned.to(device, non_blocking=True)
