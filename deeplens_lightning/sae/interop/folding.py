"""A dictionary as the plain affine maps that every library has: normalisation and units folded in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from deeplens_lightning.sae.module import SparseAutoencoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Plain:
    """Weights that act on raw activations.

    latents = activation((x - center) @ encoder.T + encoder_bias), where center is the decoder's bias
    in an autoencoder and 0 otherwise; reconstruction = latents @ decoder + decoder_bias [+ skip @ x].

    Attributes:
        encoder: `(d_sae, d_in)`.
        encoder_bias: `(d_sae,)`.
        decoder: `(d_sae, d_out)`.
        decoder_bias: `(d_out,)`.
        skip: `(d_out, d_in)` or None.
    """

    encoder: Tensor
    encoder_bias: Tensor
    decoder: Tensor
    decoder_bias: Tensor
    skip: Tensor | None = None


@torch.no_grad()
def fold(sae: SparseAutoencoder) -> Plain:
    """Fold normalisation and units into the weights, in float64; results are contiguous float32 on the CPU.

    Latents keep their values: only the maps from and to activations change.
    """
    w = {name: p.detach().cpu().double() for name, p in sae.named_parameters(recurse=False)}
    read, write = (
        {name: b.cpu().double() for name, b in side.named_buffers()} for side in (sae.read, sae.write)
    )
    shrink, grow = read["scale"] / read["unit"], write["unit"] / write["scale"]
    encoder, encoder_bias = w["W_enc"] * shrink, w["b_enc"]
    decoder_bias, skip = w["b_dec"] * grow + write["shift"], None
    if not sae.centers:  # an autoencoder's own bias takes the shift in
        encoder_bias = encoder_bias - encoder @ read["shift"]
    if "W_skip" in w:
        skip = grow[:, None] * w["W_skip"] * shrink
        decoder_bias = decoder_bias - skip @ read["shift"]
    plain = (encoder, encoder_bias, w["W_dec"] * grow, decoder_bias)
    named = dict(zip(("encoder", "encoder_bias", "decoder", "decoder_bias"), plain, strict=True))
    return Plain(
        **{k: v.float().contiguous() for k, v in named.items()}, skip=None if skip is None else skip.float()
    )


@torch.no_grad()
def unfold(sae: SparseAutoencoder, plain: Plain, **extra: Any) -> SparseAutoencoder:
    """Write plain weights, and `extra` tensors of the activation by name, into a fresh SAE."""
    sae.W_enc.copy_(plain.encoder)
    sae.b_enc.copy_(plain.encoder_bias)
    sae.W_dec.copy_(plain.decoder)
    sae.b_dec.copy_(plain.decoder_bias)
    if sae.W_skip is not None and plain.skip is not None:
        sae.W_skip.copy_(plain.skip)
    for name, value in extra.items():
        getattr(sae.activation, name).copy_(torch.as_tensor(value))
    sae.initialized.fill_(True)
    return sae


def has_unit_rows(decoder: Tensor) -> bool:
    """Whether the rows of a decoder `(d_sae, d_out)` have norm 1, so that training may hold them there."""
    return bool(((torch.linalg.vector_norm(decoder.float(), dim=1) - 1).abs() < 1e-3).all())


def center_bias(encoder: Tensor, encoder_bias: Tensor, decoder_bias: Tensor) -> Tensor:
    """The encoder bias that gives the same latents once the decoder's bias is subtracted from the input."""
    return (encoder_bias.double() + encoder.double() @ decoder_bias.double()).to(encoder_bias.dtype)
