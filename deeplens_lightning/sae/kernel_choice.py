"""Choose between Triton kernels and torch's own operations."""

from __future__ import annotations

import os
import sysconfig
import warnings
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import torch
import torch.distributed as dist
from torch import Tensor

MISSING = [
    what
    for what, there in {
        'Triton (pip install "deeplens-lightning[kernels]")': find_spec("triton") is not None,
        "a C compiler, which Triton calls (gcc or clang, or CC=...)": bool(
            os.environ.get("CC") or which("gcc") or which("clang")
        ),
        "the headers of Python, which Triton includes (python3-dev)": (
            Path(sysconfig.get_path("include")) / "Python.h"
        ).exists(),
    }.items()
    if not there
]
"""What the kernels need and this machine does not have, with what to do."""


def uses_triton(x: Tensor) -> bool:
    """Whether to compute on x with `triton_kernels.py`: on CUDA, except in float64.

    Where Triton cannot run on CUDA, torch computes, and a warning says what is missing: once per process, and on the
    first rank alone.
    """
    if not x.is_cuda or x.dtype == torch.float64:
        return False
    if MISSING and not (dist.is_available() and dist.is_initialized() and dist.get_rank() > 0):
        warnings.warn(  # Python shows the same warning once
            "sparse decoding, its gradients, and JumpReLU's gradients use slower operations of torch, because this is "
            "missing: " + "; ".join(MISSING),
            stacklevel=2,
        )
    return not MISSING
