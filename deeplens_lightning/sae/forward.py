"""Forward passes of a dictionary for inference and training, sparse or dense, and AuxK: pure functions.

In: rows to read `(batch, d_in)` and rows to reconstruct `(batch, d_out)`, both in the dictionary's
units. Out: reconstructions, and what the loss and the counters are computed from. The sparse and the dense
pass compute the same numbers; the sparse one never holds a `(batch, d_sae)` matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from deeplens_lightning.sae.activations import Activation, BatchTopK, PenaltyInputs, TopK
from deeplens_lightning.sae.initialize import rms_norm
from deeplens_lightning.sae.metrics import fvu
from deeplens_lightning.sae.nonfinite import mean_over_finite_ranks
from deeplens_lightning.sae.sparse import (
    Code,
    decode_entries,
    encode_entries,
    make_code,
    pre_activations,
    top_k,
)
from deeplens_lightning.sae.units import RowUnits

CHUNK_BYTES = 32 * 2**20  # of float32 latents, in passes over many rows

Kernel: TypeAlias = Literal["auto", "sparse", "dense"]
"""Whether a training pass computes with active latents only, or with all of them."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights of a dictionary.

    Attributes:
        encoder: `(d_sae, d_in)`.
        encoder_bias: `(d_sae,)`.
        decoder: `(d_sae, d_out)`.
        decoder_bias: `(d_out,)`.
        center: subtracted from rows before they are encoded, `(d_in,)`: the decoder's bias in an
            autoencoder, None in a transcoder.
        skip: `(d_out, d_in)`, a linear map from input to output beside the latents, or None.
    """

    encoder: Tensor
    encoder_bias: Tensor
    decoder: Tensor
    decoder_bias: Tensor
    center: Tensor | None
    skip: Tensor | None


@dataclass(frozen=True, slots=True)
class Pass:
    """Results of a training pass.

    Attributes:
        reconstructions: `(levels, batch, d_out)`; a level for each Matryoshka prefix, the last of all latents.
        fired: bool `(d_sae,)`, latents that are active in any row.
        active: scalar, number of active latents in all rows together.
        smallest: scalar, the smallest active value; infinity if there is none.
        penalty: scalar sparsity penalty.
    """

    reconstructions: Tensor
    fired: Tensor
    active: Tensor
    smallest: Tensor
    penalty: Tensor


@dataclass(frozen=True, slots=True)
class Step:
    """Results of a training step: the loss with its graph, and detached scalars `fvu` and `l0` to log."""

    loss: Tensor
    fvu: Tensor
    l0: Tensor


def encode(x: Tensor, w: Weights, activation: Activation) -> Tensor:
    """Latents `(..., d_sae)` of x `(..., d_in)`, for inference."""
    pre = F.linear(x if w.center is None else x - w.center, w.encoder, w.encoder_bias)
    latents: Tensor = activation(pre, w.encoder_bias)
    return latents


def decode(latents: Tensor, w: Weights) -> Tensor:
    """Reconstructions `(..., d_out)` of latents `(..., d_sae)`, without the skip connection."""
    return latents @ w.decoder + w.decoder_bias


def reconstruct(x: Tensor, latents: Tensor, w: Weights) -> Tensor:
    """Reconstructions `(..., d_out)` from latents `(..., d_sae)` of x `(..., d_in)`, with the skip connection."""
    out = decode(latents, w)
    return out if w.skip is None else out + F.linear(x, w.skip)


def in_chunks(x: Tensor, w: Weights, activation: Activation) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Encode and reconstruct x `(batch, d_in)` in chunks of rows, so that the latents of all rows never exist together.

    Yields:
        The rows of a chunk, their latents `(rows, d_sae)` and their reconstructions `(rows, d_out)`.
    """
    for part in _chunks(x, activation):
        latents = encode(x[part], w, activation)
        yield part, latents, reconstruct(x[part], latents, w)


def active_entries(x: Tensor, w: Weights, activation: Activation) -> tuple[Tensor, Tensor, Tensor]:
    """The latents above 0 of x `(batch, d_in)` for inference, without the latents of all rows at once.

    Returns:
        Numbers of rows and of latents, int64 `(n,)`, sorted by row and then by latent; and values `(n,)`.
    """
    if isinstance(activation, TopK) and not isinstance(activation, BatchTopK):
        rows, latents, values = _row_top_k(x if w.center is None else x - w.center, w, activation)
        active = values > 0
        rows, latents, values = rows[active], latents[active], values[active]
        order = (rows * activation.d_sae + latents).argsort()
        return rows[order], latents[order], values[order]
    found = [(x.new_empty(0, dtype=torch.int64), x.new_empty(0, dtype=torch.int64), x.new_empty(0))]
    for part in _chunks(x, activation):
        encoded = encode(x[part], w, activation)
        row, latent = (encoded > 0).nonzero(as_tuple=True)
        found.append((row + part.start, latent, encoded[row, latent]))
    rows, latents, values = (torch.cat(parts) for parts in zip(*found, strict=True))
    return rows, latents, values


def _chunks(x: Tensor, activation: Activation) -> Iterator[slice]:
    """Consecutive rows of x `(batch, d_in)`, few enough for their latents `(rows, d_sae)`."""
    size = max(16, CHUNK_BYTES // (4 * activation.d_sae))
    for first in range(0, len(x), size):
        yield slice(first, first + size)


def autoencode(x: Tensor, w: Weights, activation: Activation) -> Tensor:
    """Reconstructions `(..., d_out)` of x `(..., d_in)`, for inference."""
    return reconstruct(x, encode(x, w, activation), w)


@torch.no_grad()
def scale_encoder(x: Tensor, w: Weights, activation: Activation) -> None:
    """Scale the encoder in place, so that reconstructions of x `(batch, d_in)` have a root mean square norm of 1."""
    made = autoencode(x, w, activation) - w.decoder_bias
    w.encoder.div_(mean_over_finite_ranks(rms_norm(made[made.isfinite().all(1)])))


@torch.no_grad()
def adopt_units(w: Weights, activation: Activation, read: RowUnits, write: RowUnits) -> None:
    """Rescale weights in place from units of 1 to the measured ones, with equal reconstructions of raw rows.

    Latents are multiplied by one factor, with which decoder rows get a root mean square norm of 1: the scale of the
    weights that learning rates, thresholds and bandwidths are meant for.

    Args:
        w: the weights.
        activation: the activation; its thresholds are rescaled.
        read: units of the rows that are encoded; with `layer_norm` they return to 1, which standardised rows do not need.
        write: units of the rows that are reconstructed.
    """
    if read.layer_norm:
        read.unit.fill_(1)
    decoder = w.decoder / write.unit
    factor = rms_norm(decoder)
    w.decoder.copy_(decoder / factor)
    w.decoder_bias.div_(write.unit)
    w.encoder.mul_(read.unit * factor)
    w.encoder_bias.mul_(factor)
    if w.skip is not None:
        w.skip.mul_(read.unit / write.unit[:, None])
    activation.scale_latents(factor)


def training_pass(
    x: Tensor, y: Tensor, w: Weights, activation: Activation, progress: float, kernel: Kernel
) -> Pass:
    """The sparse or the dense pass.

    Args:
        x: `(batch, d_in)`, rows to read.
        y: `(batch, d_out)`, rows to reconstruct.
        w: the weights.
        activation: the activation; only the top-k family has a sparse pass.
        progress: share of the planned steps that is done, for penalties that warm up.
        kernel: "auto" takes the sparse pass if few latents are active and finding them does not wait for
            the device.
    """
    if isinstance(activation, TopK):
        waits = (
            isinstance(activation, BatchTopK) and x.device.type != "cpu"
        )  # the number of candidates varies
        few = 16 * activation.k <= activation.d_sae
        if kernel == "sparse" or (kernel == "auto" and few and not waits):
            return sparse_pass(x, w, activation)
    return dense_pass(x, y, w, activation, progress)


def training_loss(
    x: Tensor,
    y: Tensor,
    w: Weights,
    activation: Activation,
    result: Pass,
    dead: tuple[Tensor, Tensor] | None,
) -> Step:
    """FVU averaged over the levels, plus the penalty and AuxK.

    Args:
        x: `(batch, d_in)`, rows to read.
        y: `(batch, d_out)`, rows to reconstruct.
        w: the weights.
        activation: the activation.
        result: the pass of these rows.
        dead: candidates for AuxK and which of them are dead, as `aux_fvu` takes them; None for no AuxK.
    """
    errors = (result.reconstructions - y).square().sum((1, 2))
    deviation, energy = (y - y.mean(0)).square().sum(), y.square().sum()
    loss = fvu(errors.mean(), deviation, energy) + result.penalty
    if dead is not None:
        residual = y - result.reconstructions[-1]
        aux = aux_fvu(x, residual, w, *dead, k=activation.aux_k)
        loss = loss + activation.aux_coefficient * aux
    last = fvu(errors[-1].detach(), deviation, energy)
    return Step(loss, last, result.active.float() / len(x))


def dense_pass(x: Tensor, y: Tensor, w: Weights, activation: Activation, progress: float) -> Pass:
    """The pass through a dense `(batch, d_sae)` matrix of latents, for any activation and device."""
    pre = F.linear(x if w.center is None else x - w.center, w.encoder, w.encoder_bias)
    latents = activation.active(pre, w.encoder_bias)
    widths = activation.widths if isinstance(activation, TopK) and activation.widths else (activation.d_sae,)
    parts = [latents[:, a:b] @ w.decoder[a:b] for a, b in zip((0, *widths), widths, strict=False)]
    firing = latents.detach() > 0
    smallest = torch.where(firing, latents.detach(), torch.inf).min()
    penalty = activation.penalty(PenaltyInputs(pre, latents, y, w.decoder, w.decoder_bias, progress))
    return Pass(_assemble(torch.stack(parts), x, w), firing.any(0), firing.sum(), smallest, penalty)


def sparse_pass(x: Tensor, w: Weights, activation: TopK) -> Pass:
    """The pass that computes with active latents only, for the top-k family."""
    with torch.no_grad():
        values, code = select(x if w.center is None else x - w.center, w, activation)
    acts = encode_entries(x, w.center, w.encoder, w.encoder_bias, values, code)
    summed = decode_entries(acts, w.decoder, code)
    parts = summed.view(len(x), -1, summed.shape[1]).transpose(0, 1)
    counts = torch.zeros(activation.d_sae, dtype=torch.float32, device=x.device)
    counts.index_add_(0, code.latents, (values > 0).float())
    smallest = (
        torch.where(values > 0, values, torch.inf).min() if len(values) else values.new_full((), torch.inf)
    )
    return Pass(_assemble(parts, x, w), counts > 0, counts.sum(), smallest, values.new_zeros(()))


def select(x: Tensor, w: Weights, activation: TopK) -> tuple[Tensor, Code]:
    """The active entries of centred rows x `(batch, d_in)`: their values `(n,)`, and their rows and latents."""
    choose = _batch_top_k if isinstance(activation, BatchTopK) else _row_top_k
    rows, latents, values = choose(x, w, activation)
    return values.to(w.decoder.dtype), make_code(rows, latents, len(x), activation.d_sae, activation.widths)


def aux_fvu(x: Tensor, residual: Tensor, w: Weights, dead: Tensor, is_dead: Tensor, k: int) -> Tensor:
    """AuxK: FVU of reconstructing the residual with dead latents (Gao et al. 2024, appendix A.2).

    Args:
        x: `(batch, d_in)`, rows to read; gradients reach the encoder and the decoder.
        residual: `(batch, d_out)`, rows minus their reconstruction; detached here.
        w: the weights.
        dead: int64 `(candidates,)`, latents that may be dead.
        is_dead: bool `(candidates,)`; the others are left out.
        k: largest number of dead latents per row.

    Returns:
        Squared error over the residual's squared deviation from its mean; 0 if the residual does not vary.
    """
    residual = residual.detach()
    pre = F.linear(x if w.center is None else x - w.center, w.encoder[dead], w.encoder_bias[dead])
    pre = torch.where(is_dead, pre, -torch.inf).relu()
    if k < len(dead):
        values, places = pre.topk(k, dim=1, sorted=False)
        pre = torch.zeros_like(pre).scatter(1, places, values)
    error = (residual - pre @ w.decoder[dead]).square().sum()
    deviation = (residual - residual.mean(0)).square().sum()
    varies = deviation > 0  # both `where`: a division by 0 would make the gradient NaN
    return torch.where(varies, error / torch.where(varies, deviation, 1.0), 0.0)


def _assemble(parts: Tensor, x: Tensor, w: Weights) -> Tensor:
    levels = parts.cumsum(0) if len(parts) > 1 else parts
    levels = levels + w.decoder_bias
    return levels if w.skip is None else levels + F.linear(x, w.skip)


def _row_top_k(x: Tensor, w: Weights, activation: TopK) -> tuple[Tensor, Tensor, Tensor]:
    pieces = [top_k(pre, activation.k) for _, pre in pre_activations(x, w.encoder, w.encoder_bias)]
    values, latents = (torch.cat(p) for p in zip(*pieces, strict=True))
    if activation.widths:  # `make_code` wants ascending latents inside a row
        latents, order = latents.sort(dim=1)
        values = values.gather(1, order)
    rows = torch.arange(len(x), device=x.device).repeat_interleave(activation.k)
    return rows, latents.flatten(), values.flatten().relu()


def _batch_top_k(x: Tensor, w: Weights, activation: TopK) -> tuple[Tensor, Tensor, Tensor]:
    """The k x batch largest entries; only those above a floor, estimated from a few rows, are searched."""
    wanted = activation.k * len(x)
    probe = F.linear(x[:32], w.encoder, w.encoder_bias).flatten()
    guess = (
        probe.topk(min(len(probe), 2 * activation.k * min(32, len(x))), sorted=False)
        .values.min()
        .clamp(min=0)
    )
    for floor in (guess, torch.zeros_like(guess)):
        found = []
        for first, pre in pre_activations(x, w.encoder, w.encoder_bias):
            row, latent = (pre > floor).nonzero(as_tuple=True)
            found.append((row + first, latent, pre[row, latent]))
        rows, latents, values = (torch.cat(p) for p in zip(*found, strict=True))
        if len(values) >= wanted:
            keep = values.topk(wanted, sorted=False).indices.sort().values
            return rows[keep], latents[keep], values[keep]
    return rows, latents, values
