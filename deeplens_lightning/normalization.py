"""Estimate and apply the normalisation of activations, an affine map with an inverse.

In: rows `(n, d_in)` of one hook point. Out: a `Scaling`, which is applied to every batch as `(x - shift) * scale`. Its
inverse returns the raw activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Normalize = Literal["none", "mean_norm", "center", "standardize", "zscore"]
"""How rows are normalised.

- `none`: rows stay raw.
- `mean_norm`: multiply by one factor, so that the mean row norm is sqrt(d_in) (Anthropic, April 2024 update).
- `center`: subtract the mean row.
- `standardize`: subtract the mean row and multiply by one factor, so that the mean squared row norm is d_in.
- `zscore`: subtract the mean row and divide each dimension by its standard deviation, except constant dimensions.
"""


@dataclass(frozen=True, slots=True)
class Scaling:
    """The normalisation of one hook point's rows: `(x - shift) * scale`.

    Attributes:
        shift: float32 `(d_in,)`, subtracted from a row.
        scale: float32 `(d_in,)`, nonzero, multiplied with the shifted row.
        is_identity: whether the map leaves rows unchanged.
    """

    shift: Tensor
    scale: Tensor
    is_identity: bool = field(init=False, repr=False, compare=False)
    _copies: dict[torch.device, tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        identity = bool((self.shift == 0).all() and (self.scale == 1).all())
        object.__setattr__(self, "is_identity", identity)  # once, and not for every batch

    @classmethod
    def identity(cls, d_in: int) -> Scaling:
        """The map that leaves rows `(..., d_in)` unchanged."""
        return cls(torch.zeros(d_in, dtype=torch.float32), torch.ones(d_in, dtype=torch.float32))

    def apply(self, rows: Tensor) -> Tensor:
        """Normalise rows `(..., d_in)`: computed in float32, returned in the dtype and on the device of `rows`."""
        shift, scale = self._on(rows.device)
        return ((rows.float() - shift) * scale).to(rows.dtype)

    def undo(self, rows: Tensor) -> Tensor:
        """Turn normalised rows `(..., d_in)` back into raw activations, in the dtype and on the device of `rows`."""
        shift, scale = self._on(rows.device)
        return (rows.float() / scale + shift).to(rows.dtype)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """`shift` and `scale` on a device; copied once, because a copy waits for the device."""
        if device not in self._copies:
            self._copies[device] = self.shift.to(device), self.scale.to(device)
        return self._copies[device]

    def state_dict(self) -> dict[str, Tensor]:
        """`shift` and `scale` on the CPU, tensors only, so that a checkpoint loads with `weights_only=True`."""
        return {"shift": self.shift.cpu(), "scale": self.scale.cpu()}

    @classmethod
    def from_state_dict(cls, state: object) -> Scaling:
        """Make a `Scaling` from its `state_dict`.

        Raises:
            ValueError: it does not hold two finite tensors float32 `(d_in,)`, or a factor is zero.
        """
        if not isinstance(state, Mapping) or state.keys() != {"shift", "scale"}:
            raise ValueError("a normalisation consists of the tensors shift and scale")
        for name, tensor in state.items():
            if not isinstance(tensor, Tensor) or tensor.dtype != torch.float32 or tensor.ndim != 1:
                raise ValueError(f"{name} of a normalisation is not a tensor float32 (d_in,)")
            if not tensor.isfinite().all():
                raise ValueError(f"{name} of a normalisation is not finite")
        shift, scale = state["shift"], state["scale"]
        if len(shift) != len(scale) or not scale.all():
            raise ValueError("shift and scale of a normalisation have different lengths, or a factor is zero")
        return cls(shift, scale)


@dataclass(slots=True)
class Moments:
    """Running float64 sums over rows, from which their normalisation is computed.

    Adding the `sums` of several ranks gives the sums over the rows of all these ranks.

    Attributes:
        d_in: width of a row.
        sums: float64 `(3 + 2 * d_in,)` on the CPU: the number of rows, the sum of their norms, the sum of their squared
            norms, then for each dimension the sum of its values, then for each dimension the sum of its squares.
    """

    d_in: int
    sums: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.sums = torch.zeros(3 + 2 * self.d_in, dtype=torch.float64)

    @property
    def count(self) -> int:
        """Number of rows that were added."""
        return int(self.sums[0])

    def update(self, rows: Tensor) -> None:
        """Add rows `(n, d_in)` of any float dtype."""
        x = rows.detach().cpu().double()  # in this order, for devices without float64
        self.sums[0] += len(x)
        self.sums[1] += x.norm(dim=1).sum()
        self.sums[2] += x.square().sum()
        self.sums[3 : 3 + self.d_in] += x.sum(0)
        self.sums[3 + self.d_in :] += x.square().sum(0)

    def scaling(self, normalize: Normalize) -> Scaling:
        """Compute the normalisation from the rows that were added.

        Args:
            normalize: `none`, `mean_norm` (mean row norm sqrt(d_in)), `center` (mean removed), `standardize` (mean
                removed, mean squared norm d_in) or `zscore` (each dimension to mean 0 and variance 1).

        Raises:
            ValueError: `normalize` is unknown, no row was added, or the rows are all zero or all equal.
        """
        check_normalize(normalize)
        if normalize == "none":
            return Scaling.identity(self.d_in)
        count = self.sums[0]
        if count == 0:
            raise ValueError(
                f"normalize={normalize!r} needs rows to compute statistics from, but the training text is empty; "
                'give a dataset with text, or normalize="none"'
            )
        mean = self.sums[3 : 3 + self.d_in] / count
        variance = (self.sums[3 + self.d_in :] / count - mean.square()).clamp(min=0)
        shift = torch.zeros_like(mean) if normalize == "mean_norm" else mean
        scale = torch.ones_like(mean)
        if normalize == "mean_norm":
            scale *= self.d_in**0.5 / _positive(self.sums[1] / count, normalize)
        elif normalize == "standardize":
            scale *= (self.d_in / _positive(variance.sum(), normalize)).sqrt()
        elif normalize == "zscore":
            floor = 1e-12 * _positive(variance.max(), normalize)
            scale = torch.where(variance > floor, variance.clamp(min=floor).rsqrt(), scale)
        return Scaling(shift.float(), scale.float())


def check_normalize(normalize: str) -> None:
    """Check the name of a normalisation.

    Raises:
        ValueError: it is none of `none`, `mean_norm`, `center`, `standardize` and `zscore`.
    """
    if normalize not in get_args(Normalize):
        raise ValueError(
            f"normalize={normalize!r} is unknown; choose one of {', '.join(get_args(Normalize))}"
        )


def scalings_state(scalings: Mapping[str, Scaling]) -> dict[str, Any]:
    """The `state_dict` of each hook point's normalisation, by canonical name."""
    return {name: scaling.state_dict() for name, scaling in scalings.items()}


def _positive(value: Tensor, normalize: str) -> Tensor:
    if not value > 0:
        raise ValueError(
            f"normalize={normalize!r} needs rows that differ, but all rows are equal or zero; check the hook point, or "
            'use normalize="none"'
        )
    return value
