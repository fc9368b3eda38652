"""Fold normalisation and units into the weights of a dictionary, as other libraries store them, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deeplens_lightning.sae.dictionary import Dictionary


@dataclass(frozen=True, slots=True, kw_only=True)
class Plain:
    """Weights that act on raw activations, without normalisation or units.

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
def fold(sae: Dictionary) -> Plain:
    """Fold normalisation and units into the weights; only maps from and to activations change, not latents.

    Computed in float64; the results are contiguous float32 tensors on the CPU.
    """
    w = {name: p.detach().cpu().double() for name, p in sae.named_parameters(recurse=False)}
    read, write = (
        {name: b.cpu().double() for name, b in units.named_buffers()} for units in (sae.read, sae.write)
    )
    shrink, grow = read["scale"] / read["unit"], write["unit"] / write["scale"]
    encoder, encoder_bias = w["W_enc"] * shrink, w["b_enc"]
    decoder_bias, skip = w["b_dec"] * grow + write["shift"], None
    if not sae.centers:  # otherwise subtracting `decoder_bias` subtracts the shift, too
        encoder_bias = encoder_bias - encoder @ read["shift"]
    if "W_skip" in w:
        skip = grow[:, None] * w["W_skip"] * shrink
        decoder_bias = decoder_bias - skip @ read["shift"]
    return Plain(
        encoder=_float32(encoder),
        encoder_bias=_float32(encoder_bias),
        decoder=_float32(w["W_dec"] * grow),
        decoder_bias=_float32(decoder_bias),
        skip=None if skip is None else _float32(skip),
    )


@torch.no_grad()
def unfold(sae: Dictionary, plain: Plain, **extra: Any) -> None:
    """Copy plain weights into a new dictionary, which counts as initialised from then on.

    Its units are 1, and latents are those of the other library. The first batch of a fit sets the units, and then
    multiplies all latents by one factor (`forward.adopt_units`).

    Args:
        sae: a dictionary of the same sizes and architecture.
        plain: the weights.
        **extra: parameters and buffers of the activation by name.
    """
    sae.W_enc.copy_(plain.encoder)
    sae.b_enc.copy_(plain.encoder_bias)
    sae.W_dec.copy_(plain.decoder)
    sae.b_dec.copy_(plain.decoder_bias)
    if sae.W_skip is not None and plain.skip is not None:
        sae.W_skip.copy_(plain.skip)
    own = sae.activation.state_dict()  # shares memory with the parameters and buffers
    for name, value in extra.items():
        own[name].copy_(torch.as_tensor(value))
    sae.initialized.fill_(True)


def has_equal_norms(decoder: Tensor) -> bool:
    """Whether all rows of a decoder `(d_sae, d_out)` have one norm, which training may keep at 1 in own units."""
    norms = torch.linalg.vector_norm(decoder.float(), dim=1)
    return bool(((norms / norms.mean() - 1).abs() < 1e-3).all())


def center_bias(encoder: Tensor, encoder_bias: Tensor, decoder_bias: Tensor) -> Tensor:
    """The encoder bias `(d_sae,)` with which latents stay the same if the decoder's bias is subtracted first.

    Args:
        encoder: `(d_sae, d_in)`.
        encoder_bias: `(d_sae,)`, for rows from which nothing is subtracted.
        decoder_bias: `(d_in,)`.
    """
    return (encoder_bias.double() + encoder.double() @ decoder_bias.double()).to(encoder_bias.dtype)


def _float32(x: Tensor) -> Tensor:
    return x.float().contiguous()
