"""Rows on disk: as they are, or 8 bits each with one scale per row.

The 8-bit form keeps `round(x / s)` with `s = max|x| / 127` of its row, in float32. An element comes
back within `max|x| / 254` of itself (and then rounded to the activation dtype). For rows without
outliers that is about 0.7% of the row's norm, an FVU of 5e-5; one huge dimension costs all the others
of its row their precision.
"""

from __future__ import annotations

import torch
from torch import Tensor


def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `(n, d_in)` of any float dtype as int8 `(n, d_in)` and float32 scales `(n,)`."""
    rows = rows.float()
    scales = rows.abs().amax(dim=1) / 127
    steps = torch.where(scales > 0, scales, 1).unsqueeze(1)
    return (rows / steps).round_().clamp_(-127, 127).to(torch.int8), scales


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `quantize`, up to its error."""
    return (codes.float() * scales.unsqueeze(1)).to(dtype)
