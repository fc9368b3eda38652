"""Triton kernels for a GPU: sparse decoding, sparse weight gradients, and JumpReLU's gradients.

In: tensors on one device, in float32, bfloat16 or float16. Out: the same sums as `sparse.py` and `straight_through.py`
compute with torch. All sums accumulate in float32. No kernel uses atomics: every sum has a fixed order, so the
same inputs give the same bits. `torch.compile` does not trace the launches. This module imports Triton;
`kernel_choice.py` decides whether it is used.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ENTRIES = 16  # entries of a bag that are read at the same time
COLUMNS = 256  # columns of a table that one program reads
TILE = (64, 64)  # rows and columns of pre-activations that one program reads
OPTIONS = {"enable_fp_fusion": True}  # written out, because the default differs between releases of Triton


def bag_sum(indices: Tensor, table: Tensor, starts: Tensor, values: Tensor) -> Tensor:
    """Sum `values[i] * table[indices[i]]` over the entries i of each bag; gradients reach `values` alone.

    Args:
        indices: int64 `(n,)`, rows of the table.
        table: `(rows, width)`.
        starts: int64 `(bags + 1,)`, ascending from 0 to n: the first entry of each bag.
        values: `(n,)`.

    Returns:
        `(bags, width)` in the table's dtype; zeros for a bag without entries.
    """
    result: Tensor = _apply_bag_sum(indices, table.contiguous(), starts, values)
    return result


def bag_dot(indices: Tensor, table: Tensor, starts: Tensor, bags: Tensor, like: Tensor) -> Tensor:
    """Dot product of `table[indices[i]]` with the row of its bag, for each entry i: the gradient of `bag_sum`.

    Args:
        indices: int64 `(n,)`, rows of the table.
        table: `(rows, width)`, contiguous.
        starts: int64 `(number of bags + 1,)`, as in `bag_sum`.
        bags: `(number of bags, width)`.
        like: `(n,)`; the result has its dtype.

    Returns:
        `(n,)`.
    """
    out, width = torch.empty_like(like), table.shape[1]
    with torch.cuda.device_of(table):
        _bag_dot_kernel[(len(bags),)](
            indices.contiguous(),
            table,
            starts,
            bags.contiguous(),
            out,
            width,
            ENTRIES,
            _columns(width),
            **OPTIONS,
        )
    return out


def jump_relu_gradients(
    grad: Tensor, pre: Tensor, threshold: Tensor, bandwidth: float, *, to_input: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `straight_through.jump_relu` for `pre` `(..., d_sae)` and for `threshold` `(d_sae,)`.

    Args:
        grad: gradient of the result, of the shape of `pre`.
        pre: pre-activations `(..., d_sae)`.
        threshold: `(d_sae,)`.
        bandwidth: width of the kernel of the straight-through gradient.
        to_input: let the gradient of this kernel also reach `pre`.
    """
    d_pre = torch.empty_like(pre, memory_format=torch.contiguous_format)
    d_threshold: Tensor = _threshold_gradient(grad, pre, threshold, bandwidth, d_pre, to_input)
    return d_pre, d_threshold


def step_gradient(grad: Tensor, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """Gradient of `straight_through.step` for `threshold`: `(d_sae,)`; arguments as in `jump_relu_gradients`."""
    d_threshold: Tensor = _threshold_gradient(grad, pre, threshold, bandwidth, None, False)
    return d_threshold


class _BagSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, indices: Tensor, table: Tensor, starts: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(indices, table, starts, values)
        n_bags, width = len(starts) - 1, table.shape[1]
        out = table.new_empty(n_bags, width)
        columns = _columns(width)
        with torch.cuda.device_of(table):
            _bag_sum_kernel[(n_bags, triton.cdiv(width, columns))](
                indices.contiguous(),
                table,
                starts,
                values.contiguous(),
                out,
                width,
                ENTRIES,
                columns,
                **OPTIONS,
            )
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        indices, table, starts, values = ctx.saved_tensors
        return None, None, None, bag_dot(indices, table, starts, grad, values)


_apply_bag_sum = torch.compiler.disable(_BagSum.apply)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _threshold_gradient(
    grad: Tensor, pre: Tensor, threshold: Tensor, bandwidth: float, d_pre: Tensor | None, to_input: bool
) -> Tensor:
    grad, pre = grad.flatten(0, -2), pre.flatten(0, -2).contiguous()
    (rows, width), (n, m) = pre.shape, TILE
    grid = (triton.cdiv(width, m), triton.cdiv(rows, n))
    sums = torch.empty(grid[1], width, dtype=torch.float32, device=pre.device)
    with torch.cuda.device_of(pre):
        _jump_relu_kernel[grid](
            grad, *grad.stride(), pre, threshold, d_pre, sums, float(bandwidth), rows, width,
            d_pre is not None, to_input, n, m, **OPTIONS,
        )  # fmt: skip
    return -sums.sum(0).to(threshold.dtype)


def _columns(width: int) -> int:
    columns: int = min(COLUMNS, triton.next_power_of_2(width))
    return columns


@triton.jit  # type: ignore[untyped-decorator]
def _bag_sum_kernel(  # type: ignore[no-untyped-def]
    indices, table, starts, values, out, width,
    n_entries: tl.constexpr, n_columns: tl.constexpr,
):  # fmt: skip
    bag = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * n_columns + tl.arange(0, n_columns)
    inside = columns < width
    end = tl.load(starts + bag + 1)
    products = tl.zeros((n_entries, n_columns), tl.float32)
    for first in range(tl.load(starts + bag), end, n_entries):
        entries = first + tl.arange(0, n_entries)
        there = entries < end
        rows = tl.load(indices + entries, mask=there, other=0)
        factors = tl.load(values + entries, mask=there, other=0).to(tl.float32)
        places = table + rows[:, None] * width + columns[None, :]
        tile = tl.load(places, mask=there[:, None] & inside[None, :], other=0).to(tl.float32)
        products += factors[:, None] * tile
    tl.store(out + bag * width + columns, tl.sum(products, 0), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _bag_dot_kernel(  # type: ignore[no-untyped-def]
    indices, table, starts, bags, out, width,
    n_entries: tl.constexpr, n_columns: tl.constexpr,
):  # fmt: skip
    bag = tl.program_id(0).to(tl.int64)
    end = tl.load(starts + bag + 1)
    for first in range(tl.load(starts + bag), end, n_entries):
        entries = first + tl.arange(0, n_entries)
        there = entries < end
        rows = tl.load(indices + entries, mask=there, other=0)
        products = tl.zeros((n_entries, n_columns), tl.float32)
        for left in range(0, width, n_columns):
            columns = left + tl.arange(0, n_columns)
            inside = columns < width
            one = tl.load(bags + bag * width + columns, mask=inside, other=0).to(tl.float32)
            places = table + rows[:, None] * width + columns[None, :]
            tile = tl.load(places, mask=there[:, None] & inside[None, :], other=0).to(tl.float32)
            products += one[None, :] * tile
        tl.store(out + entries, tl.sum(products, 1), mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _jump_relu_kernel(  # type: ignore[no-untyped-def]
    grad, grad_row, grad_column, pre, threshold, d_pre, sums,
    bandwidth, n_rows, width,
    jump: tl.constexpr, to_input: tl.constexpr, tile_rows: tl.constexpr, tile_columns: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1).to(tl.int64)
    column = (tl.program_id(0) * tile_columns + tl.arange(0, tile_columns)).to(tl.int64)
    rows, columns = (block * tile_rows + tl.arange(0, tile_rows))[:, None], column[None, :]
    inside = (rows < n_rows) & (columns < width)
    z = tl.load(pre + rows * width + columns, mask=inside, other=0).to(tl.float32)
    g = tl.load(grad + rows * grad_row + columns * grad_column, mask=inside, other=0).to(tl.float32)
    theta = tl.load(threshold + columns, mask=columns < width, other=0).to(tl.float32)
    through = g * (tl.where(tl.abs(z - theta) < bandwidth / 2, 1.0, 0.0) / bandwidth)
    if jump:
        through = through * theta
        d_z = tl.where(z > theta, g, 0.0)
        if to_input:
            d_z = d_z + through
        tl.store(d_pre + rows * width + columns, d_z, mask=inside)
    tl.store(sums + block * width + column, tl.sum(through, 0), mask=column < width)
