"""Sparse encoding, decoding and weight gradients, computed from active latents only.

In: the active entries of a batch as a `Code`. Out: reconstructions, whose backward pass never builds
the `(batch, d_sae)` latents or their gradient. All sums are bag sums: decoding sums rows of `W_dec` over the
entries of a row of the batch, and a weight gradient sums rows of the batch over the entries of a latent. A Triton
kernel computes them on CUDA, and `embedding_bag`, which torch has for every device, everywhere else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deeplens_lightning.model.cpu_kernels import linear
from deeplens_lightning.sae.kernel_choice import uses_triton

ENCODE_CHUNK_BYTES = 8 * 2**20  # so that pre-activations stay in the CPU's cache between matmul and top-k
ENCODE_CHUNK_BYTES_GPU = 512 * 2**20


@dataclass(frozen=True, slots=True)
class Code:
    """The active entries of a batch, sorted by row, and the same entries sorted by latent.

    Attributes:
        rows: int64 `(n,)`, the batch row of each entry, ascending.
        latents: int64 `(n,)`, the latent of each entry.
        bags: int64 `(n,)`, index of the sum that each entry belongs to, ascending: its row, or with prefixes
            row * number of prefixes + prefix.
        bag_starts: int64 `(bags + 1,)`, first entry of each bag.
        by_latent: int64 `(n,)`, indices that sort the entries by latent.
        latent_starts: int64 `(d_sae + 1,)`, first index into `by_latent` of each latent.
    """

    rows: Tensor
    latents: Tensor
    bags: Tensor
    bag_starts: Tensor
    by_latent: Tensor
    latent_starts: Tensor


def make_code(rows: Tensor, latents: Tensor, n_rows: int, d_sae: int, widths: tuple[int, ...] = ()) -> Code:
    """Sort entries by row and by latent.

    Args:
        rows: int64 `(n,)`, ascending.
        latents: int64 `(n,)`; ascending inside a row if there are prefixes.
        n_rows: number of rows in the batch.
        d_sae: number of latents.
        widths: ascending lengths of prefixes, the last one `d_sae`; empty for no prefixes.
    """
    bags, n_bags = rows, n_rows
    if widths:
        # a tensor of `widths` would wait for a GPU
        prefix = sum(((latents >= width).long() for width in widths[:-1]), torch.zeros_like(latents))
        bags, n_bags = rows * len(widths) + prefix, n_rows * len(widths)
    ordered, by_latent = latents.sort(stable=True)
    return Code(rows, latents, bags, _starts(bags, n_bags), by_latent, _starts(ordered, d_sae))


def pre_activations(x: Tensor, weight: Tensor, bias: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield pre-activations of x `(batch, d_in)` in chunks of rows: (first row, `(rows, d_sae)`).

    A chunk fits into the CPU's cache, from which the selection of active latents then reads it, and the whole
    `(batch, d_sae)` matrix never exists.
    """
    budget = ENCODE_CHUNK_BYTES if x.device.type == "cpu" else ENCODE_CHUNK_BYTES_GPU
    step = max(16, budget // (4 * len(weight)))
    for first in range(0, len(x), step):
        yield first, linear(x[first : first + step], weight, bias)


def top_k(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of pre `(rows, d_sae)`: values and latents `(rows, k)`, unsorted.

    Exact except for ties. On the CPU, latents with equal index modulo d_sae / groups form a set of `groups`
    latents. The k largest lie in the k sets with the largest maxima, so that the slow `topk` runs over
    d_sae / groups maxima and k * groups candidates instead of d_sae values.
    """
    rows, d_sae = pre.shape
    groups = power_of_two_near(math.sqrt(d_sae / k))
    if groups < 4 or d_sae % groups or pre.device.type != "cpu":
        return pre.topk(k, dim=1, sorted=False)
    grouped = pre.view(rows, groups, d_sae // groups)
    best = grouped.amax(1).topk(k, dim=1, sorted=False).indices
    candidates = grouped.gather(2, best[:, None, :].expand(-1, groups, -1)).flatten(1)
    values, places = candidates.topk(k, dim=1, sorted=False)
    return values, best.gather(1, places % k) + places.div(k, rounding_mode="floor") * (d_sae // groups)


def encode_entries(
    x: Tensor, center: Tensor | None, weight: Tensor, bias: Tensor, values: Tensor, code: Code
) -> Tensor:
    """Attach the gradient for the encoder to activations `(n,)` that were computed without it.

    Args:
        x: `(batch, d_in)`, before `center` is subtracted.
        center: `(d_in,)` or None.
        weight: `W_enc` `(d_sae, d_in)`.
        bias: `b_enc` `(d_sae,)`.
        values: `(n,)`, `relu((x - center) @ W_enc.T + b_enc)` at the entries.
        code: the entries.
    """
    result: Tensor = _EncodeEntries.apply(x, center, weight, bias, values, code)  # type: ignore[no-untyped-call]
    return result


def decode_entries(values: Tensor, weight: Tensor, code: Code) -> Tensor:
    """Sum `values[i] * weight[latents[i]]` over the entries of each bag: `(bags, d_out)`, with gradients to both.

    Args:
        values: `(n,)`, activations at the entries.
        weight: `W_dec` `(d_sae, d_out)`.
        code: the entries.
    """
    out = _bag_sum(code.latents, weight.detach(), code.bag_starts, values)
    result: Tensor = _WeightGradient.apply(out, weight, values.detach(), code)  # type: ignore[no-untyped-call]
    return result


class _EncodeEntries(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, center: Tensor | None, weight: Tensor, bias: Tensor, values: Tensor, code: Code
    ) -> Tensor:
        ctx.save_for_backward(x, center, weight, values)
        ctx.code = code
        ctx.bias_dtype = bias.dtype
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, center, weight, values = ctx.saved_tensors
        code: Code = ctx.code
        grad = torch.where(values > 0, grad, 0)
        d_bias = _total_by_latent(code, grad)
        centered = x if center is None else x - center
        d_weight = _sum_by_latent(code, code.rows, centered, grad)
        d_center = -(d_bias.to(weight.dtype) @ weight) if center is not None else None
        d_x = None
        if ctx.needs_input_grad[0]:
            starts = _starts(code.rows, len(x))
            d_x = _bag_sum(code.latents, weight, starts, grad)
        return d_x, d_center, d_weight, d_bias.to(ctx.bias_dtype), None, None


class _WeightGradient(torch.autograd.Function):
    """The identity on decoded rows, whose backward pass computes the decoder's weight gradient."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, weight: Tensor, values: Tensor, code: Code) -> Tensor:  # noqa: ARG004
        ctx.save_for_backward(values)
        ctx.code = code
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (values,) = ctx.saved_tensors
        return grad, _sum_by_latent(ctx.code, ctx.code.bags, grad, values), None, None


def _sum_by_latent(code: Code, sources: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """For each latent, the sum of `values[i] * rows[sources[i]]` over its entries: `(d_sae, d)`."""
    order = code.by_latent
    return _bag_sum(sources[order], rows.contiguous(), code.latent_starts, values[order])


def _total_by_latent(code: Code, values: Tensor) -> Tensor:
    """For each latent, the sum of `values` over its entries, in float32 or wider: `(d_sae,)`."""
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    if wide.device.type == "cpu":
        return wide.new_zeros(len(code.latent_starts) - 1).index_add_(0, code.latents, wide)
    # `index_add_` is not deterministic on CUDA
    return _sum_by_latent(code, torch.zeros_like(code.rows), wide.new_ones(1, 1), wide).squeeze(1)


def _bag_sum(indices: Tensor, table: Tensor, starts: Tensor, values: Tensor) -> Tensor:
    if uses_triton(table):
        from deeplens_lightning.sae.triton_kernels import bag_sum

        return bag_sum(indices, table, starts, values)
    return F.embedding_bag(
        indices,
        table,
        starts,
        mode="sum",
        per_sample_weights=values.to(table.dtype),
        include_last_offset=True,
    )


def power_of_two_near(x: float) -> int:
    """The power of two nearest to x on a logarithmic scale, at least 1."""
    return int(2 ** max(0, round(math.log2(x))))


def _starts(ascending: Tensor, n: int) -> Tensor:
    return torch.searchsorted(ascending, torch.arange(n + 1, device=ascending.device))
