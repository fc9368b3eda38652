"""What makes latents sparse: one small module per published activation, with its parameters and penalty.

In: pre-activations `(rows, d_sae)`. Out: latents of the same shape, and the sparsity penalty that its
paper adds to the reconstruction loss. Rows reach the dictionary with unit mean squared norm (see
`SparseAutoencoder.unit`), the convention of these papers, so that coefficients, thresholds and
bandwidths mean the same whatever the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deeplens_lightning.sae.sparse import power_of_two_near
from deeplens_lightning.sae.straight_through import jump_relu, step


@dataclass(frozen=True, slots=True)
class PenaltyInputs:
    """What a penalty may look at.

    Attributes:
        pre: `(batch, d_sae)` pre-activations.
        latents: `(batch, d_sae)` activations.
        target: `(batch, d_out)`, what is reconstructed.
        decoder: `W_dec` `(d_sae, d_out)`.
        decoder_bias: `(d_out,)`.
        progress: share of the planned steps that is done.
    """

    pre: Tensor
    latents: Tensor
    target: Tensor
    decoder: Tensor
    decoder_bias: Tensor
    progress: float


class Activation(nn.Module):
    """Base of all activations.

    Attributes:
        unit_norm: decoder rows are held at norm 1.
        aux_k: latents that AuxK lets reconstruct the residual; 0 means no AuxK.
        aux_coefficient: weight of AuxK's loss.
    """

    unit_norm: bool = True
    aux_k: int = 0
    aux_coefficient: float = 0.0

    def __init__(self, d_sae: int) -> None:
        super().__init__()
        self.d_sae = d_sae

    def forward(self, pre: Tensor, bias: Tensor) -> Tensor:
        """Latents `(..., d_sae)` at inference, each row on its own.

        Args:
            pre: `(..., d_sae)` pre-activations, the encoder's bias included.
            bias: that bias, `(d_sae,)`.
        """
        raise NotImplementedError

    def active(self, pre: Tensor, bias: Tensor) -> Tensor:
        """Latents `(batch, d_sae)` while training."""
        latents: Tensor = self(pre, bias)
        return latents

    def penalty(self, inputs: PenaltyInputs) -> Tensor:
        """What the paper adds to the reconstruction loss; zero for the top-k family."""
        return inputs.pre.new_zeros(())

    def project(self) -> None:
        """Bring parameters back to where they are allowed to be."""


class ReLU(Activation):
    """ReLU with an L1 penalty weighted by decoder norms (Conerly et al., Anthropic, April 2024 update).

    The decoder's norm is free; the penalty warms up linearly over the first `warmup` of the steps.

    Args:
        d_sae: latents.
        l1: coefficient of the penalty.
        warmup: share of the steps over which it grows from 0.
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
    mean of the losses of reconstructing from the first `width` latents, for every width.

    Args:
        d_sae: latents.
        k: active latents a row.
        d_in: width of what is reconstructed, for the published `aux_k`.
        aux_k: dead latents that reconstruct the residual; default d_in / 2 rounded to a power of two.
        aux_coefficient: weight of that loss; 0 switches it off.
        prefixes: ascending widths, as shares of d_sae (floats) or numbers of latents.
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


class BatchTopK(TopK):
    """The k x batch largest pre-activations of a whole batch (Bussmann et al. 2024, arXiv 2412.06410).

    Inference uses a threshold, the running mean of the smallest active value of a batch, so that a
    row's latents do not depend on its neighbours.

    Args:
        d_sae: latents.
        k: active latents a row, on average.
        d_in: width of what is reconstructed, for the published `aux_k`.
        aux_k: as for `TopK`.
        aux_coefficient: as for `TopK`.
        prefixes: as for `TopK`.
        threshold_momentum: weight of the past in the running threshold.
    """

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
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("threshold_batches", torch.zeros((), dtype=torch.int64))

    def forward(self, pre: Tensor, bias: Tensor) -> Tensor:  # noqa: ARG002, D102
        return torch.where(pre > self.threshold.to(pre.dtype), pre, 0).relu()

    def active(self, pre: Tensor, bias: Tensor) -> Tensor:  # noqa: ARG002, D102
        flat = pre.relu().flatten()
        values, places = flat.topk(self.k * len(pre), sorted=False)
        return torch.zeros_like(flat).scatter(0, places, values).view_as(pre)

    @torch.no_grad()
    def observe(self, smallest: Tensor) -> None:
        """Take a batch's smallest active value, already averaged over ranks, into the threshold.

        The first batches weigh equally, so that the threshold never remembers its initial 0.
        """
        self.threshold_batches += 1
        weight = (1 / self.threshold_batches.to(self.threshold)).clamp(min=1 - self.threshold_momentum)
        self.threshold.lerp_(smallest.to(self.threshold), weight)


class JumpReLU(Activation):
    """A learned threshold for every latent (Rajamanoharan et al. 2024, arXiv 2407.14435).

    `penalty="l0"` is that paper's: the number of active latents, with gradients to the threshold alone.
    `penalty="tanh"` is Anthropic's (January 2025 update): tanh(c * latent * decoder norm), with the
    straight-through gradient reaching the encoder too. Thresholds are trained directly, not as
    logarithms, and kept at 0 or above.

    Args:
        d_sae: latents.
        coefficient: weight of the penalty.
        penalty: "l0" or "tanh".
        bandwidth: width of the straight-through kernel.
        init_threshold: every threshold at the start.
        warmup: share of the steps over which the penalty grows from 0.
        tanh_scale: c above.
    """

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
            raise ValueError(f"penalty={penalty!r} is unknown to jumprelu; choose l0 or tanh")
        self.coefficient, self.kind, self.bandwidth = coefficient, penalty, bandwidth
        self.warmup, self.tanh_scale = warmup, tanh_scale
        self.threshold = nn.Parameter(torch.full((d_sae,), init_threshold))

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
    """Separate gates and magnitudes over shared directions (Rajamanoharan et al. 2024, arXiv 2404.16014).

    The encoder's own bias is the gate's. The penalty is L1 on the rectified gates plus the error of
    reconstructing from them through a frozen copy of the decoder.

    Args:
        d_sae: latents.
        l1: coefficient of the L1 term.
        warmup: share of the steps over which it grows from 0.
    """

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


ACTIVATIONS: dict[str, type[Activation]] = {
    "relu": ReLU,
    "topk": TopK,
    "batch_topk": BatchTopK,
    "jumprelu": JumpReLU,
    "gated": Gated,
}
MATRYOSHKA: dict[str, Any] = {"name": "batch_topk", "prefixes": [1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0]}


def architecture_spec(architecture: str | Mapping[str, Any]) -> dict[str, Any]:
    """The full form `{"name": ..., **settings}` of a name or a mapping; "matryoshka" is spelled out.

    Raises:
        ValueError: the name is unknown.
    """
    spec = {"name": architecture} if isinstance(architecture, str) else dict(architecture)
    name = str(spec.get("name", "topk")).lower().replace("-", "_").replace("batchtopk", "batch_topk")
    if name == "matryoshka":
        return {**MATRYOSHKA, **spec, "name": "batch_topk"}
    if name not in ACTIVATIONS:
        known = [*ACTIVATIONS, "matryoshka"]
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(known)}"
        raise ValueError(f"architecture {name!r} is unknown; {hint}")
    return {**spec, "name": name}


def make_activation(spec: Mapping[str, Any], *, d_sae: int, d_out: int, k: int) -> Activation:
    """Build what `architecture_spec` names; `unit_norm` overrides that of its class.

    Raises:
        ValueError: a setting that this activation does not have.
    """
    kind = ACTIVATIONS[spec["name"]]
    settings = {name: value for name, value in spec.items() if name != "name"}
    unit_norm = settings.pop("unit_norm", kind.unit_norm)
    known = [name for name in inspect.signature(kind).parameters if name not in ("d_sae", "d_in", "k")]
    for name in settings:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
            raise ValueError(f"architecture {spec['name']!r} has no setting {name!r}; {hint}")
    if issubclass(kind, TopK):
        settings |= {"k": k, "d_in": d_out, "prefixes": tuple(settings.get("prefixes", ()))}
    activation = kind(d_sae, **settings)
    activation.unit_norm = bool(unit_norm)
    return activation


def _ramp(value: float, progress: float, warmup: float) -> float:
    return value * min(1.0, progress / warmup) if warmup > 0 else value


def _widths(prefixes: tuple[float, ...], d_sae: int) -> tuple[int, ...]:
    if not prefixes:
        return ()
    widths = tuple(round(p * d_sae) if isinstance(p, float) else p for p in prefixes)
    widths = widths if widths[-1] == d_sae else (*widths, d_sae)
    if widths[0] < 1 or any(b <= a for a, b in pairwise(widths)):
        raise ValueError(
            f"prefixes={list(prefixes)} give widths {list(widths)} of {d_sae} latents: they must increase"
        )
    return widths
