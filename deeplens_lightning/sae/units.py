"""Convert activations of one or several hook points to the units of a dictionary, and back.

In: raw activations, or batches as a data module serves them (normalised). Out: rows of all hook points joined,
in the dictionary's own units, in which the rows of each hook point have a mean squared norm of 1 around their median.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from deeplens_lightning.normalization import Scaling
from deeplens_lightning.sae.float32_state import Float32State
from deeplens_lightning.sae.initialize import geometric_median, rms_norm
from deeplens_lightning.sae.nonfinite import mean_over_finite_ranks
from deeplens_lightning.types import Batch

Scalings: TypeAlias = Scaling | Mapping[str, Scaling]
"""The normalisation of served batches; by hook point if there are several."""


class RowUnits(Float32State):
    """Units of the joined rows of one or several hook points, `width` being the sum of their widths.

    own units = (raw - shift) * scale / unit. `shift` and `scale` are a data module's normalisation;
    `unit` is measured on the first batch. All of them are float32 in every precision, and rows are converted in float32,
    or in float64 if they are given in it.

    Args:
        hooks: width of each hook point, in the order in which rows are joined.
        layer_norm: standardise every row to mean 0 and variance 1 after the conversion to own units.

    Attributes:
        shift: float32 `(width,)`.
        scale: float32 `(width,)`.
        unit: float32 `(width,)`.
        factor: float32 `(width,)`, from served rows to own units; not in the state dict.
        offset: float32 `(width,)`, added after `factor`; not in the state dict.
    """

    shift: Tensor
    scale: Tensor
    unit: Tensor
    factor: Tensor
    offset: Tensor

    def __init__(self, hooks: Mapping[str, int], *, layer_norm: bool = False) -> None:
        super().__init__()
        self.hooks = dict(hooks)
        self.width = sum(hooks.values())
        self.layer_norm = layer_norm
        self.register_buffer("shift", torch.zeros(self.width, dtype=torch.float32))
        self.register_buffer("scale", torch.ones(self.width, dtype=torch.float32))
        self.register_buffer("unit", torch.ones(self.width, dtype=torch.float32))
        self.register_buffer("factor", torch.ones(self.width, dtype=torch.float32), persistent=False)
        self.register_buffer("offset", torch.zeros(self.width, dtype=torch.float32), persistent=False)
        self._has_offset = False

    def join(self, batch: Batch) -> Tensor:
        """The rows of these hook points in a batch, joined, float32 or float64 `(..., width)`."""
        chosen = [batch] if isinstance(batch, Tensor) else [batch[hook] for hook in self.hooks]
        wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in chosen]
        return wide[0] if len(wide) == 1 else torch.cat(wide, dim=-1)

    @property
    def is_measured(self) -> bool:
        """Whether `unit` was measured: it is 1 in a new dictionary and in an imported one. Waits for the device."""
        return bool((self.unit != 1).any())

    def from_raw(self, x: Batch) -> Tensor:
        """Convert raw activations to own units, `(..., width)`."""
        return self._finish((self.join(x) - self.shift) * (self.scale / self.unit))

    def to_raw(self, rows: Tensor) -> Tensor:
        """Convert rows in own units `(..., width)` to raw activations; inverse of `from_raw` without `layer_norm`."""
        return rows * (self.unit / self.scale) + self.shift

    def split(self, raw: Tensor) -> Tensor | dict[str, Tensor]:
        """Split joined rows `(..., width)` by hook point, if there are several."""
        if len(self.hooks) == 1:
            return raw
        parts = torch.split(raw, list(self.hooks.values()), dim=-1)
        return dict(zip(self.hooks, parts, strict=True))

    def from_served(self, batch: Batch) -> Tensor:
        """Convert a batch as the data module serves it to own units, `(batch, width)`; call `expect` before."""
        return self._finish(self._converted(batch))

    @torch.no_grad()
    def adopt(self, served: Scalings | None) -> None:
        """Use the normalisation of served batches as `shift` and `scale`."""
        shift, scale = self._shift_and_scale(served)
        self.shift.copy_(shift)
        self.scale.copy_(scale)

    @torch.no_grad()
    def expect(self, served: Scalings | None) -> None:
        """Prepare `from_served` for batches normalised by `served`, which may differ from `shift` and `scale`."""
        shift, scale = (x.to(self.scale) for x in self._shift_and_scale(served))
        self.factor.copy_(self.scale / (scale * self.unit))
        self.offset.copy_((shift - self.shift) * self.scale / self.unit)
        self._has_offset = bool((self.offset != 0).any())

    @torch.no_grad()
    def measure(self, batch: Batch) -> Tensor:
        """Set `unit`, which is 1 so far, from a served batch, the same on all ranks; call `expect` before.

        Returns:
            The geometric median of the rows `(width,)`, in own units, averaged over the ranks that have rows without NaN
            or infinity; NaN if no rank has any, and `unit` is unchanged.
        """
        medians, units = [], []
        start = 0
        joined = self._converted(batch)
        for width in self.hooks.values():
            rows = joined[:, start : start + width].float()
            rows = rows[rows.isfinite().all(1)]
            start += width
            median = mean_over_finite_ranks(geometric_median(rows))
            unit = mean_over_finite_ranks(rms_norm(rows - median))
            medians.append(median / unit)
            units.append(unit.expand(width))
        measured = torch.cat(units)
        if measured.isfinite().all():
            self.unit.copy_(measured)
        return torch.cat(medians)

    def _converted(self, batch: Batch) -> Tensor:
        rows = self.join(batch) * self.factor
        return rows + self.offset if self._has_offset else rows

    def _finish(self, rows: Tensor) -> Tensor:
        return F.layer_norm(rows, (self.width,)) if self.layer_norm else rows

    def _shift_and_scale(self, served: Scalings | None) -> tuple[Tensor, Tensor]:
        if served is None:
            return torch.zeros_like(self.shift), torch.ones_like(self.scale)
        chosen = [served] if isinstance(served, Scaling) else [served[hook] for hook in self.hooks]
        return torch.cat([s.shift for s in chosen]), torch.cat([s.scale for s in chosen])


def choose_hooks(
    d_in: int | Mapping[str, int], hook: str | Sequence[str] | None, argument: str
) -> dict[str, int]:
    """Widths of the chosen hook points by name, in order; an int `d_in` gives one with the name "".

    Args:
        d_in: width of the rows; by hook point if there are several.
        hook: name or names to choose; default all.
        argument: name of the argument that `hook` was given as, for error messages.

    Raises:
        ValueError: a hook point that is not in `d_in`, or a name with an int `d_in`.
    """
    if not isinstance(d_in, Mapping):
        if hook is not None:
            raise ValueError(f"{argument}={hook!r} needs d_in by hook point (a dict), but d_in={d_in}")
        return {"": int(d_in)}
    names = list(d_in) if hook is None else [hook] if isinstance(hook, str) else list(hook)
    for name in names:
        if name not in d_in:
            raise ValueError(f"{argument}={name!r} is not served; the data has {', '.join(d_in)}")
    return {name: int(d_in[name]) for name in names}
