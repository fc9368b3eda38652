"""Activation statistics and the affine normalisation made of them, and its inverse.

In: rows `(n, d_in)` of one hook point. Out: a `Scaling`, applied to every batch as
`(x - shift) * scale` and undone by an SAE that wants to read raw activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Normalize = Literal["none", "mean_norm", "center", "standardize", "zscore"]
"""How rows are scaled.

- `none`: as they are.
- `mean_norm`: one factor, so that the mean row norm is sqrt(d_in) (Anthropic, April 2024 update).
- `center`: the mean row removed.
- `standardize`: the mean row removed, then one factor, so that the mean squared norm is d_in.
- `zscore`: each dimension to mean 0 and variance 1 (dimensions that never vary keep factor 1).
"""


@dataclass(frozen=True, slots=True)
class Scaling:
    """An invertible affine map of one hook point's rows.

    Attributes:
        shift: float32 `(d_in,)`, subtracted first.
        scale: float32 `(d_in,)`, multiplied afterwards, nowhere zero.
    """

    shift: Tensor
    scale: Tensor

    @classmethod
    def identity(cls, d_in: int) -> Scaling:
        """The map that changes nothing."""
        return cls(torch.zeros(d_in, dtype=torch.float32), torch.ones(d_in, dtype=torch.float32))

    @property
    def is_identity(self) -> bool:
        """Whether applying it would change nothing."""
        return bool((self.shift == 0).all() and (self.scale == 1).all())

    def apply(self, rows: Tensor) -> Tensor:
        """Normalise rows `(..., d_in)`; the dtype and device of `rows` are kept."""
        return ((rows.float() - self.shift.to(rows.device)) * self.scale.to(rows.device)).to(rows.dtype)

    def undo(self, rows: Tensor) -> Tensor:
        """Bring normalised rows `(..., d_in)` back to raw activations."""
        return (rows.float() / self.scale.to(rows.device) + self.shift.to(rows.device)).to(rows.dtype)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors only, so that a checkpoint loads with `weights_only=True`."""
        return {"shift": self.shift.cpu(), "scale": self.scale.cpu()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Scaling:
        """The inverse of `state_dict`."""
        return cls(state["shift"], state["scale"])


@dataclass(slots=True)
class Moments:
    """Running float64 sums of rows, mergeable over ranks by adding their `sums`.

    The layout of `sums` is `[count, norms, squares, *per-dimension sum, *per-dimension square sum]`.
    """

    d_in: int
    sums: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.sums = torch.zeros(3 + 2 * self.d_in, dtype=torch.float64)

    @property
    def count(self) -> int:
        """Rows seen."""
        return int(self.sums[0])

    def update(self, rows: Tensor) -> None:
        """Add rows `(n, d_in)` of any float dtype."""
        x = rows.detach().to("cpu", torch.float64)
        self.sums[0] += len(x)
        self.sums[1] += x.norm(dim=1).sum()
        self.sums[2] += x.square().sum()
        self.sums[3 : 3 + self.d_in] += x.sum(0)
        self.sums[3 + self.d_in :] += x.square().sum(0)

    def scaling(self, normalize: Normalize) -> Scaling:
        """The map that gives these rows the property that `normalize` names.

        Raises:
            ValueError: `normalize` is unknown, or no row was seen, or all rows are zero.
        """
        check_normalize(normalize)
        if normalize == "none":
            return Scaling.identity(self.d_in)
        count = self.sums[0]
        if count == 0:
            raise ValueError("no rows to take activation statistics from: the training text is empty")
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
    """Refuse an unknown normalisation before anything slow happens."""
    if normalize not in get_args(Normalize):
        raise ValueError(
            f"normalize={normalize!r} is unknown; choose one of {', '.join(get_args(Normalize))}"
        )


def scalings_state(scalings: Mapping[str, Scaling]) -> dict[str, Any]:
    """`state_dict` of several hook points' maps, by canonical name."""
    return {name: scaling.state_dict() for name, scaling in scalings.items()}


def _positive(value: Tensor, normalize: str) -> Tensor:
    if not value > 0:
        raise ValueError(
            f"normalize={normalize!r} needs rows that vary, but every row seen is the same or zero"
        )
    return value
