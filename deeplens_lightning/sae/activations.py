"""Sparse activation functions: one module for each published one, with its parameters and penalty.

In: pre-activations `(rows, d_sae)`. Out: latents of the same shape, and the sparsity penalty that the
paper adds to the reconstruction loss. A dictionary converts rows to a mean squared norm of 1 (see `units.py`),
as these papers do, so that coefficients, thresholds and bandwidths have the same meaning for every model.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from deeplens_lightning.sae.float32_state import Float32State
from deeplens_lightning.sae.sparse import power_of_two_near
from deeplens_lightning.sae.straight_through import jump_relu, step


@dataclass(frozen=True, slots=True)
class PenaltyInputs:
    """Inputs of `Activation.penalty`.

    Attributes:
        pre: `(batch, d_sae)` pre-activations.
        latents: `(batch, d_sae)` activations.
        target: `(batch, d_out)`, rows to reconstruct.
        decoder: `W_dec` `(d_sae, d_out)`.
        decoder_bias: `(d_out,)`.
        progress: share of the planned steps that is done, between 0 and 1.
    """

    pre: Tensor
    latents: Tensor
    target: Tensor
    decoder: Tensor
    decoder_bias: Tensor
    progress: float


class Activation(nn.Module):
    """Base class of all activation functions.

    Args:
        d_sae: number of latents.

    Attributes:
        unit_norm: decoder rows are kept at norm 1.
        aux_k: number of dead latents that reconstruct the residual in AuxK; 0 means no AuxK.
        aux_coefficient: weight of AuxK's loss.
        in_latent_units: names of the parameters and buffers that are in the units of the latents.
    """

    unit_norm: bool = True
    aux_k: int = 0
    aux_coefficient: float = 0.0
    in_latent_units: tuple[str, ...] = ()

    def __init__(self, d_sae: int) -> None:
        super().__init__()
        self.d_sae = d_sae

    def forward(self, pre: Tensor, bias: Tensor) -> Tensor:
        """Latents `(..., d_sae)` for inference; each row is independent of the others.

        Args:
            pre: `(..., d_sae)` pre-activations, with the encoder's bias.
            bias: the encoder's bias, `(d_sae,)`.
        """
        raise NotImplementedError

    def active(self, pre: Tensor, bias: Tensor) -> Tensor:
        """Latents `(batch, d_sae)` for training, which may depend on the whole batch."""
        latents: Tensor = self(pre, bias)
        return latents

    def penalty(self, inputs: PenaltyInputs) -> Tensor:
        """The scalar that is added to the reconstruction loss; zero for the top-k family."""
        return inputs.pre.new_zeros(())

    @torch.no_grad()
    def scale_latents(self, factor: Tensor) -> None:
        """Rescale `in_latent_units` in place, for pre-activations that are multiplied by a positive scalar."""
        own = self.state_dict()  # shares memory with the parameters and buffers
        for name in self.in_latent_units:
            own[name].mul_(factor)

    def project(self) -> None:
        """Restore the constraints of the parameters, in place."""


class ReLU(Activation):
    """ReLU with an L1 penalty weighted by decoder norms (Conerly et al., Anthropic, April 2024 update).

    The norms of decoder rows are free.

    Args:
        d_sae: number of latents.
        l1: coefficient of the penalty.
        warmup: share of the planned steps over which the coefficient rises linearly from 0.
    """

    unit_norm = False

    def __init__(self, d_sae: int, l1: float = 0.1, warmup: float = 0.05) -> None:
        super().__init__(d_sae)
        self.l1, self.warmup = l1, warmup

    def forward(self, pre: Tensor, bias: Tensor) -> Tensor:  # noqa: ARG002, D102
        return pre.relu()

    def penalty(self, inputs: PenaltyInputs) -> Tensor:  # noqa: D102
        cost: Tensor = (inputs.latents @ torch.linalg.vector_norm(inputs.decoder, dim=1)).mean()
        return cost * _ramp(self.l1, inputs.progress, self.warmup)


class TopK(Activation):
    """The k largest pre-activations of each row, rectified, with AuxK (Gao et al. 2024, arXiv 2406.04093).

    With `prefixes` it is a Matryoshka SAE (Bussmann et al. 2025, arXiv 2503.17547): the loss is the
    mean over all prefixes of the loss of reconstructing from the latents of the prefix alone.

    Args:
        d_sae: number of latents.
        k: number of active latents per row.
        d_in: width of the rows that are reconstructed, for the default of `aux_k`.
        aux_k: number of dead latents that reconstruct the residual; default d_in / 2, rounded to a power of two.
        aux_coefficient: weight of AuxK's loss; 0 switches AuxK off.
        prefixes: ascending lengths of the prefixes, as shares of d_sae (floats) or as numbers of latents.

    Raises:
        ValueError: `k` is not between 1 and `d_sae`, or `prefixes` do not increase.
    """

    def __init__(
        self,
        d_sae: int,
        k: int,
        d_in: int,
        aux_k: int | None = None,
        aux_coefficient: float = 1 / 32,
        prefixes: tuple[float, ...] = (),
    ) -> None:
        super().__init__(d_sae)
        if not 1 <= k <= d_sae:
            raise ValueError(
                f"k={k} latents of {d_sae} cannot be active: choose k between 1 and d_sae={d_sae}"
            )
        self.k = k
        self.aux_k = min(d_sae, power_of_two_near(d_in / 2)) if aux_k is None else aux_k
        self.aux_coefficient = aux_coefficient
        self.widths = _widths(prefixes, d_sae)

    def forward(self, pre: Tensor, bias: Tensor) -> Tensor:  # noqa: ARG002, D102
        values, latents = pre.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, latents, values.relu())


class BatchTopK(Float32State, TopK):
    """The k x batch largest pre-activations of a whole batch (Bussmann et al. 2024, arXiv 2412.06410).

    Inference uses a threshold, the running mean of each batch's smallest active value, so that the latents of
    a row do not depend on the other rows of its batch.

    Args:
        d_sae: number of latents.
        k: number of active latents per row, on average.
        d_in: width of the rows that are reconstructed, for the default of `aux_k`.
        aux_k: number of dead latents that reconstruct the residual; default d_in / 2, rounded to a power of two.
        aux_coefficient: weight of AuxK's loss; 0 switches AuxK off.
        prefixes: ascending lengths of Matryoshka prefixes, as shares of d_sae (floats) or as numbers of latents.
        threshold_momentum: largest weight of the previous threshold in the running mean.

    Attributes:
        threshold: float32 scalar in every precision, latents above it are active in inference.
        threshold_batches: int64 scalar, number of batches in the running mean.
    """

    in_latent_units = ("threshold",)
    threshold: Tensor
    threshold_batches: Tensor

    def __init__(
        self,
        d_sae: int,
        k: int,
        d_in: int,
        aux_k: int | None = None,
        aux_coefficient: float = 1 / 32,
        prefixes: tuple[float, ...] = (),
        threshold_momentum: float = 0.99,
    ) -> None:
        super().__init__(d_sae, k, d_in, aux_k, aux_coefficient, prefixes)
        self.threshold_momentum = threshold_momentum
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float32))
        self.register_buffer("threshold_batches", torch.zeros((), dtype=torch.int64))

    def forward(self, pre: Tensor, bias: Tensor) -> Tensor:  # noqa: ARG002, D102
        return torch.where(
            pre > self.threshold[None], pre, 0
        ).relu()  # [None]: a 0-d tensor would be cast to pre.dtype

    def active(self, pre: Tensor, bias: Tensor) -> Tensor:  # noqa: ARG002, D102
        flat = pre.relu().flatten()
        values, places = flat.topk(self.k * len(pre), sorted=False)
        return torch.zeros_like(flat).scatter(0, places, values).view_as(pre)

    @torch.no_grad()
    def observe(self, smallest: Tensor) -> None:
        """Update the threshold with a batch's smallest active value, averaged over ranks.

        It is a mean over about the latest twentieth of all batches, but no more than `threshold_momentum` remembers: the
        initial 0 has no weight, and the large values of the first steps are soon forgotten. A value that is not finite,
        from a batch without active latents, does not count.
        """
        counts = smallest.isfinite()
        self.threshold_batches += counts
        weight = 20 / (self.threshold_batches.to(self.threshold) + 19)
        weight = weight.clamp(min=1 - self.threshold_momentum)
        mean = self.threshold.lerp(smallest.to(self.threshold), weight)
        self.threshold.copy_(torch.where(counts, mean, self.threshold))


class JumpReLU(Float32State, Activation):
    """A learned threshold for each latent (Rajamanoharan et al. 2024, arXiv 2407.14435).

    `penalty="l0"` is the one of this paper: the number of active latents, with gradients to the threshold alone.
    `penalty="tanh"` is Anthropic's (January 2025 update): the sum of tanh(tanh_scale * latent * decoder norm),
    with a straight-through gradient that also reaches the encoder. The parameters are the thresholds themselves,
    not their logarithms, are float32 in every precision, and are kept at 0 or above.

    Args:
        d_sae: number of latents.
        coefficient: weight of the penalty.
        penalty: "l0" or "tanh".
        bandwidth: width of the straight-through kernel.
        init_threshold: initial value of all thresholds.
        warmup: share of the planned steps over which the coefficient rises linearly from 0.
        tanh_scale: factor inside the tanh.

    Raises:
        ValueError: an unknown penalty.
    """

    in_latent_units = ("threshold",)

    def __init__(
        self,
        d_sae: int,
        coefficient: float = 1e-3,
        penalty: Literal["l0", "tanh"] = "l0",
        bandwidth: float = 0.02,
        init_threshold: float = 0.02,
        warmup: float = 0.1,
        tanh_scale: float = 4.0,
    ) -> None:
        super().__init__(d_sae)
        if penalty not in ("l0", "tanh"):
            raise ValueError(f"penalty={penalty!r} is unknown to jumprelu; choose 'l0' or 'tanh'")
        self.coefficient, self.kind, self.bandwidth = coefficient, penalty, bandwidth
        self.warmup, self.tanh_scale = warmup, tanh_scale
        self.threshold = nn.Parameter(torch.full((d_sae,), init_threshold, dtype=torch.float32))

    def forward(self, pre: Tensor, bias: Tensor) -> Tensor:  # noqa: ARG002, D102
        return jump_relu(pre, self.threshold, self.bandwidth, to_input=self.kind == "tanh")

    def penalty(self, inputs: PenaltyInputs) -> Tensor:  # noqa: D102
        if self.kind == "l0":
            count = step(inputs.pre, self.threshold, self.bandwidth).sum(1).mean()
        else:
            norms = torch.linalg.vector_norm(inputs.decoder, dim=1)
            count = torch.tanh(self.tanh_scale * inputs.latents * norms).sum(1).mean()
        return _ramp(self.coefficient, inputs.progress, self.warmup) * count

    @torch.no_grad()
    def project(self) -> None:  # noqa: D102
        self.threshold.clamp_(min=0)


class Gated(Activation):
    """Gates and magnitudes with shared encoder weights (Rajamanoharan et al. 2024, arXiv 2404.16014).

    The encoder's bias is the bias of the gates. The penalty is the L1 norm of the rectified gates, plus the
    squared error of reconstructing from them with detached decoder weights.

    Args:
        d_sae: number of latents.
        l1: coefficient of the L1 term.
        warmup: share of the planned steps over which the coefficient rises linearly from 0.
    """

    in_latent_units = ("magnitude_bias",)

    def __init__(self, d_sae: int, l1: float = 0.1, warmup: float = 0.05) -> None:
        super().__init__(d_sae)
        self.l1, self.warmup = l1, warmup
        self.log_gain = nn.Parameter(torch.zeros(d_sae))
        self.magnitude_bias = nn.Parameter(torch.zeros(d_sae))

    def forward(self, pre: Tensor, bias: Tensor) -> Tensor:  # noqa: D102
        magnitudes = (pre - bias) * self.log_gain.exp() + self.magnitude_bias
        return torch.where(pre > 0, magnitudes, 0).relu()

    def penalty(self, inputs: PenaltyInputs) -> Tensor:  # noqa: D102
        gates = inputs.pre.relu()
        frozen = gates @ inputs.decoder.detach() + inputs.decoder_bias.detach()
        error = (frozen - inputs.target).square().sum(1).mean()
        return _ramp(self.l1, inputs.progress, self.warmup) * gates.sum(1).mean() + error


def _ramp(value: float, progress: float, warmup: float) -> float:
    return value * min(1.0, progress / warmup) if warmup > 0 else value


def _widths(prefixes: tuple[float, ...], d_sae: int) -> tuple[int, ...]:
    if not prefixes:
        return ()
    widths = tuple(round(p * d_sae) if isinstance(p, float) else p for p in prefixes)
    widths = widths if widths[-1] == d_sae else (*widths, d_sae)
    if widths[0] < 1 or any(b <= a for a, b in pairwise(widths)):
        raise ValueError(
            f"prefixes={list(prefixes)} mean the first {list(widths)} of {d_sae} latents: they must increase"
        )
    return widths
