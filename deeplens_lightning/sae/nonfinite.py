"""Reject rows with NaN or Inf: stop and name the first, or leave them out and count them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class NonFiniteRowsError(ValueError):
    """Training rows hold NaN or infinity."""


@torch.no_grad()
def screen(
    x: Tensor,
    y: Tensor,
    neutral: Tensor,
    seen: Tensor,
    on_nonfinite: str,
    report: Callable[[Tensor], str] | None = None,
) -> tuple[Tensor, Tensor]:
    """Replace rows that hold NaN or infinity by a neutral row, count them, and stop if asked to.

    On the CPU stopping is immediate. Elsewhere looking would wait for the device: rows are replaced
    and counted, and `raise_if_counted` stops on a step that logs.

    Args:
        x: `(batch, d_read)`.
        y: `(batch, d_write)`, the same tensor as x in an autoencoder.
        neutral: `(d_write,)`, a row with nothing to learn from: the decoder's bias.
        seen: int64 scalar that counts such rows.
        on_nonfinite: "stop" or "skip".
        report: words for the offending rows (their indices).

    Raises:
        NonFiniteRowsError: on the CPU with "stop".
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
    """The stop of devices other than the CPU, on steps that log."""
    if int(seen) > 0:
        raise NonFiniteRowsError(_message(f"{int(seen)} rows so far", "they were left out of the updates"))


def _message(how_many: str, where: str) -> str:
    return (
        f"{how_many} hold NaN or infinity ({where}); find out why the model gives them "
        "(float16 overflow is the usual reason: try bfloat16), or leave them out with on_nonfinite='skip'"
    )
