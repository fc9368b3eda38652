"""One training pass of a dictionary, sparse or dense, and AuxK: pure functions of tensors and weights.

In: rows to read `(batch, d_in)` and rows to reconstruct `(batch, d_out)`, both in the dictionary's
units. Out: what the loss and the counters need. The sparse and the dense pass compute the same
numbers; the sparse one never holds a `(batch, d_sae)` matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deeplens_lightning.sae.activations import Activation, BatchTopK, PenaltyInputs, TopK
from deeplens_lightning.sae.sparse import (
    Code,
    decode_entries,
    encode_entries,
    make_code,
    pre_activations,
    top_k,
)


@dataclass(frozen=True, slots=True)
class Weights:
    """A dictionary's tensors.

    Attributes:
        encoder: `(d_sae, d_in)`.
        encoder_bias: `(d_sae,)`.
        decoder: `(d_sae, d_out)`.
        decoder_bias: `(d_out,)`.
        center: what is subtracted from rows before encoding, `(d_in,)`: the decoder's bias in an
            autoencoder, None in a transcoder.
        skip: `(d_out, d_in)`, a linear map beside the latents, or None.
    """

    encoder: Tensor
    encoder_bias: Tensor
    decoder: Tensor
    decoder_bias: Tensor
    center: Tensor | None
    skip: Tensor | None


@dataclass(frozen=True, slots=True)
class Pass:
    """What a training pass gives.

    Attributes:
        reconstructions: `(levels, batch, d_out)`; the last level uses every latent.
        fired: bool `(d_sae,)`, latents active in any row.
        active: scalar, active latents in all rows together.
        smallest: scalar, the smallest active value.
        penalty: scalar sparsity penalty.
    """

    reconstructions: Tensor
    fired: Tensor
    active: Tensor
    smallest: Tensor
    penalty: Tensor


@dataclass(frozen=True, slots=True)
class Step:
    """What a training step computed: the loss with its graph, and detached scalars to log."""

    loss: Tensor
    fvu: Tensor
    l0: Tensor


def encode(x: Tensor, w: Weights, activation: Activation) -> Tensor:
    """Latents `(..., d_sae)` of x `(..., d_in)` at inference."""
    pre = F.linear(x if w.center is None else x - w.center, w.encoder, w.encoder_bias)
    latents: Tensor = activation(pre, w.encoder_bias)
    return latents


def decode(latents: Tensor, w: Weights) -> Tensor:
    """Reconstructions `(..., d_out)` of latents `(..., d_sae)`, the skip connection left out."""
    return latents @ w.decoder + w.decoder_bias


def reconstruct(x: Tensor, latents: Tensor, w: Weights) -> Tensor:
    """Reconstructions `(..., d_out)` from latents `(..., d_sae)` of x `(..., d_in)`, skip included."""
    out = decode(latents, w)
    return out if w.skip is None else out + F.linear(x, w.skip)


def dense_pass(x: Tensor, y: Tensor, w: Weights, activation: Activation, progress: float) -> Pass:
    """The pass through dense latents: any activation, any device."""
    pre = F.linear(x if w.center is None else x - w.center, w.encoder, w.encoder_bias)
    latents = activation.active(pre, w.encoder_bias)
    widths = activation.widths if isinstance(activation, TopK) and activation.widths else (activation.d_sae,)
    parts = [latents[:, a:b] @ w.decoder[a:b] for a, b in zip((0, *widths), widths, strict=False)]
    firing = latents.detach() > 0
    smallest = torch.where(firing, latents.detach(), torch.inf).min()
    penalty = activation.penalty(PenaltyInputs(pre, latents, y, w.decoder, w.decoder_bias, progress))
    return Pass(_assemble(torch.stack(parts), x, w), firing.any(0), firing.sum(), smallest, penalty)


def sparse_pass(x: Tensor, w: Weights, activation: TopK) -> Pass:
    """The pass that touches only active latents, for the top-k family."""
    with torch.no_grad():
        values, code = select(x if w.center is None else x - w.center, w, activation)
    acts = encode_entries(x, w.center, w.encoder, w.encoder_bias, values, code)
    summed = decode_entries(acts, w.decoder, code)
    parts = summed.view(len(x), -1, summed.shape[1]).transpose(0, 1)
    counts = values.new_zeros(activation.d_sae).index_add_(0, code.latents, (values > 0).to(values.dtype))
    smallest = (
        torch.where(values > 0, values, torch.inf).min() if len(values) else values.new_full((), torch.inf)
    )
    return Pass(_assemble(parts, x, w), counts > 0, counts.sum(), smallest, values.new_zeros(()))


def select(x: Tensor, w: Weights, activation: TopK) -> tuple[Tensor, Code]:
    """The active entries of centred rows x `(batch, d_in)`: their values `(n,)` and where they are."""
    choose = _batch_top_k if isinstance(activation, BatchTopK) else _row_top_k
    rows, latents, values = choose(x, w, activation)
    return values.to(w.decoder.dtype), make_code(rows, latents, len(x), activation.d_sae, activation.widths)


def aux_fvu(x: Tensor, residual: Tensor, w: Weights, dead: Tensor, is_dead: Tensor, k: int) -> Tensor:
    """AuxK: dead latents reconstruct what the living left over (Gao et al. 2024, appendix A.2).

    Args:
        x: `(batch, d_in)`, what is encoded; gradients reach the encoder and the decoder.
        residual: `(batch, d_out)`, detached here.
        w: the dictionary.
        dead: int64 `(candidates,)`.
        is_dead: bool `(candidates,)`; candidates that are alive take no part.
        k: at most so many dead latents a row.

    Returns:
        Squared error over the residual's squared deviation from its mean; 0 where that is not a number.
    """
    residual = residual.detach()
    pre = F.linear(x if w.center is None else x - w.center, w.encoder[dead], w.encoder_bias[dead])
    pre = torch.where(is_dead, pre, -torch.inf).relu()
    if k < len(dead):
        values, places = pre.topk(k, dim=1, sorted=False)
        pre = torch.zeros_like(pre).scatter(1, places, values)
    error = (residual - pre @ w.decoder[dead]).square().sum()
    deviation = (residual - residual.mean(0)).square().sum()
    varies = deviation > 0  # chosen before dividing, so that the gradient is a number too
    return torch.where(varies, error / torch.where(varies, deviation, 1.0), 0.0)


def _assemble(parts: Tensor, x: Tensor, w: Weights) -> Tensor:
    levels = parts.cumsum(0) if len(parts) > 1 else parts
    levels = levels + w.decoder_bias
    return levels if w.skip is None else levels + F.linear(x, w.skip)


def _row_top_k(x: Tensor, w: Weights, activation: TopK) -> tuple[Tensor, Tensor, Tensor]:
    pieces = [top_k(pre, activation.k) for _, pre in pre_activations(x, w.encoder, w.encoder_bias)]
    values, latents = (torch.cat(p) for p in zip(*pieces, strict=True))
    if activation.widths:  # prefix levels are runs inside a row
        latents, order = latents.sort(dim=1)
        values = values.gather(1, order)
    rows = torch.arange(len(x), device=x.device).repeat_interleave(activation.k)
    return rows, latents.flatten(), values.flatten().relu()


def _batch_top_k(x: Tensor, w: Weights, activation: TopK) -> tuple[Tensor, Tensor, Tensor]:
    """The k x batch largest, exactly: the best of the entries above a floor guessed from a few rows."""
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
