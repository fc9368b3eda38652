"""Choose between Triton kernels and torch's own operations."""

from __future__ import annotations

import warnings
from importlib.util import find_spec

import torch
import torch.distributed as dist
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None


def uses_triton(x: Tensor) -> bool:
    """Whether to compute on x with `triton_kernels.py`: on CUDA, where Triton is installed, except in float64.

    Without Triton on CUDA a warning names the package, once per process and on the first rank alone.
    """
    if not x.is_cuda or x.dtype == torch.float64:
        return False
    if not HAS_TRITON and not (dist.is_available() and dist.is_initialized() and dist.get_rank() > 0):
        warnings.warn(  # Python shows the same warning once
            "Triton is not installed: sparse decoding, weight gradients and JumpReLU use slower operations of torch; "
            'for the kernels: pip install "deeplens-lightning[kernels]"',
            stacklevel=2,
        )
    return HAS_TRITON
