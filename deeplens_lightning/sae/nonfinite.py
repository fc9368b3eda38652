"""Reject rows with NaN or Inf: raise an error that names the first, or leave them out and count them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class NonFiniteRowsError(ValueError):
    """Training rows hold NaN or infinity."""


@torch.no_grad()
def replace_nonfinite(
    x: Tensor,
    y: Tensor,
    neutral: Tensor,
    seen: Tensor,
    on_nonfinite: str,
    report: Callable[[Tensor], str] | None = None,
) -> tuple[Tensor, Tensor]:
    """Replace rows that hold NaN or infinity, and count them or raise an error.

    On the CPU, "stop" raises at once. On another device that would wait for the device: rows are replaced and
    counted, and `raise_if_counted` raises on the next step that logs.

    Args:
        x: `(batch, d_read)`, rows to read.
        y: `(batch, d_write)`, rows to reconstruct; the same tensor as x in an autoencoder.
        neutral: `(d_write,)`, replaces rows of y: the decoder's bias, from which nothing is learned.
        seen: int64 scalar, to which the number of such rows is added.
        on_nonfinite: "stop" or "skip".
        report: from the indices of such rows to a description for the error message.

    Returns:
        x and y with the rows replaced; in x by zeros, unless x is y.

    Raises:
        NonFiniteRowsError: there are such rows, x is on the CPU, and `on_nonfinite` is "stop".
    """
    on_cpu = x.device.type == "cpu"
    if on_cpu and torch.isfinite(x.sum() + y.sum()):  # a sum is finite only if every term is
        return x, y
    bad = ~(x.isfinite().all(1) & y.isfinite().all(1))
    seen += bad.sum()
    if on_cpu and on_nonfinite == "stop" and bad.any():
        rows = bad.nonzero().squeeze(1)
        where = report(rows) if report else f"first is row {int(rows[0])}"
        raise NonFiniteRowsError(_message(f"{len(rows)} of {len(x)} rows", where))
    clean_y = torch.where(bad[:, None], neutral, y)
    if y is x:
        return clean_y, clean_y
    return torch.where(bad[:, None], torch.zeros_like(x), x), clean_y


def raise_if_counted(seen: Tensor) -> None:
    """Raise NonFiniteRowsError if rows were counted; for devices other than the CPU, on steps that log."""
    if int(seen) > 0:
        raise NonFiniteRowsError(_message(f"{int(seen)} rows so far", "they were left out of the updates"))


def _message(how_many: str, where: str) -> str:
    return (
        f"{how_many} hold NaN or infinity ({where}); find out why the model computes them "
        "(usually float16 overflow: try bfloat16), or leave these rows out with on_nonfinite='skip'"
    )
