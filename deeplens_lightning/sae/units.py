"""One side of a dictionary: the hook points it reads or writes, and the units of their rows.

In: raw activations, or the scaled rows that a data module serves. Out: rows in the dictionary's own
units, where each hook point has unit mean squared norm around its median, and back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeplens_lightning.distributed import mean_over_ranks
from deeplens_lightning.normalization import Scaling
from deeplens_lightning.sae.initialize import geometric_median, rms_norm

Batch = Tensor | Mapping[str, Tensor]
Scalings = Scaling | Mapping[str, Scaling]


class Side(nn.Module):
    """Rows of one or several hook points, side by side.

    own units = (raw - shift) * scale / unit. `shift` and `scale` are the data module's normalisation,
    `unit` is measured on the first batch.

    Args:
        hooks: width of each hook point, in order.
        layer_norm: bring every row to mean 0 and variance 1 in the end.
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
        self.register_buffer("shift", torch.zeros(self.width))
        self.register_buffer("scale", torch.ones(self.width))
        self.register_buffer("unit", torch.ones(self.width))
        self.register_buffer("factor", torch.ones(self.width), persistent=False)
        self.register_buffer("offset", torch.zeros(self.width), persistent=False)
        self._has_offset = False

    def join(self, batch: Batch) -> Tensor:
        """The side's hook points of a batch next to each other, `(..., width)`."""
        if isinstance(batch, Tensor):
            return batch.to(self.scale.dtype)
        chosen = [batch[hook].to(self.scale.dtype) for hook in self.hooks]
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=-1)

    def from_raw(self, x: Batch) -> Tensor:
        """Raw activations in own units, `(..., width)`."""
        return self._finish((self.join(x) - self.shift) * (self.scale / self.unit))

    def to_raw(self, rows: Tensor) -> Tensor:
        """Rows in own units as raw activations, `(..., width)`."""
        return rows * (self.unit / self.scale) + self.shift

    def split(self, raw: Tensor) -> Tensor | dict[str, Tensor]:
        """By hook point when there are several, as a batch comes."""
        if len(self.hooks) == 1:
            return raw
        parts = torch.split(raw, list(self.hooks.values()), dim=-1)
        return dict(zip(self.hooks, parts, strict=True))

    def from_served(self, batch: Batch) -> Tensor:
        """A data module's batch in own units, `(batch, width)`; see `serve`."""
        rows = self.join(batch) * self.factor
        return self._finish(rows + self.offset if self._has_offset else rows)

    @torch.no_grad()
    def adopt(self, served: Scalings | None) -> None:
        """Make the data module's normalisation this side's own, so that it reads raw activations."""
        shift, scale = self._served(served)
        self.shift.copy_(shift)
        self.scale.copy_(scale)

    @torch.no_grad()
    def serve(self, served: Scalings | None) -> None:
        """Prepare `from_served` for batches scaled by `served`, which need not be this side's own."""
        shift, scale = (x.to(self.scale) for x in self._served(served))
        self.factor.copy_(self.scale / (scale * self.unit))
        self.offset.copy_((shift - self.shift) * self.scale / self.unit)
        self._has_offset = bool((self.offset != 0).any())

    @torch.no_grad()
    def measure(self, batch: Batch) -> Tensor:
        """Set the units from a batch of served rows, alike on all ranks; returns the median in own units."""
        medians, units = [], []
        start = 0
        joined = self.join(batch)
        for width in self.hooks.values():
            rows = joined[:, start : start + width].float()
            rows = rows[rows.isfinite().all(1)]
            start += width
            median = mean_over_ranks(geometric_median(rows) if len(rows) else rows.new_zeros(width))
            unit = mean_over_ranks(rms_norm(rows - median) if len(rows) else rows.new_ones(()))
            medians.append(median / unit)
            units.append(unit.expand(width))
        self.unit.copy_(torch.cat(units))
        return torch.cat(medians)

    def _finish(self, rows: Tensor) -> Tensor:
        return F.layer_norm(rows, (self.width,)) if self.layer_norm else rows

    def _served(self, served: Scalings | None) -> tuple[Tensor, Tensor]:
        if served is None:
            return torch.zeros_like(self.shift), torch.ones_like(self.scale)
        chosen = [served] if isinstance(served, Scaling) else [served[hook] for hook in self.hooks]
        return torch.cat([s.shift for s in chosen]), torch.cat([s.scale for s in chosen])


def choose_hooks(
    d_in: int | Mapping[str, int], hook: str | Sequence[str] | None, argument: str
) -> dict[str, int]:
    """Widths by hook point, in order; the only hook of an int `d_in` is called "".

    Raises:
        ValueError: a hook point that the data does not serve.
    """
    if not isinstance(d_in, Mapping):
        if hook is not None:
            raise ValueError(f"{argument}={hook!r} needs d_in by hook point, a dict, but d_in={d_in}")
        return {"": int(d_in)}
    names = list(d_in) if hook is None else [hook] if isinstance(hook, str) else list(hook)
    for name in names:
        if name not in d_in:
            raise ValueError(f"{argument}={name!r} is not served; the data has {', '.join(d_in)}")
    return {name: int(d_in[name]) for name in names}
