"""The SAE in training as callbacks see it: raw activations by hook point in, latents and reconstructions out.

Autoencoders, transcoders and crosscoders differ in what they read and write; a user's own module
may know nothing of hook points. This is the one place where callbacks care.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SaeView:
    """Public `encode`, `decode` and `forward` of a module, by hook point.

    Attributes:
        module: the LightningModule in training.
        reads: canonical names of the hook points that it encodes.
        writes: those that it reconstructs.
        by_forward: whether `module(x)` is the reconstruction; else `decode(encode(x))` is.
    """

    module: Any
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    by_forward: bool

    @property
    def hooks(self) -> tuple[str, ...]:
        """All hook points it needs, each once."""
        return tuple(dict.fromkeys(self.reads + self.writes))

    def encode(self, rows: Mapping[str, Tensor]) -> Tensor:
        """Latents `(n, d_sae)` of raw rows `(n, d_in)` by hook point."""
        latents: Tensor = self.module.encode(self._input(rows))
        return latents

    def reconstruct(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Raw reconstructions `(n, d_in)` by the hook points it writes."""
        x = self._input(rows)
        out = self.module(x) if self.by_forward else self.module.decode(self.module.encode(x))
        return dict(out) if isinstance(out, Mapping) else {self.writes[0]: out}

    def _input(self, rows: Mapping[str, Tensor]) -> Tensor | dict[str, Tensor]:
        if len(self.reads) == 1:
            return rows[self.reads[0]]
        return {name: rows[name] for name in self.reads}


def find_sae(
    module: LightningModule, names: Sequence[str], hook: str | None = None, sae: str | None = None
) -> SaeView | None:
    """The module as an SAE, or None where it lacks `encode` and `decode`.

    Args:
        module: the LightningModule in training.
        names: hook points that the batches hold; empty where unknown.
        hook: the one to look at, for a module that does not say itself what it reads.
        sae: which one, of a module that trains several side by side (`dictionaries`); default the first.

    Raises:
        ValueError: several hook points, and neither the module nor `hook` says which; or no SAE called `sae`.
    """
    module = _one_of(module, sae)
    if not (callable(getattr(module, "encode", None)) and callable(getattr(module, "decode", None))):
        return None
    read, write = (getattr(getattr(module, side, None), "hooks", None) for side in ("read", "write"))
    if isinstance(read, Mapping) and isinstance(write, Mapping):  # a SparseAutoencoder's two sides
        reads = tuple(name or choose_hook(names, hook) for name in read)
        writes = tuple(name or choose_hook(names, hook) for name in write)
        return SaeView(module, reads, writes, by_forward=True)
    one = (choose_hook(names, hook),)
    return SaeView(module, one, one, by_forward=False)


def require_sae(
    module: LightningModule, names: Sequence[str], callback: str, sae: str | None = None
) -> SaeView:
    """The module as an SAE.

    Raises:
        TypeError: it lacks `encode` or `decode`; the message says what they must do.
        ValueError: as `find_sae`.
    """
    view = find_sae(module, names, sae=sae)
    if view is None:
        raise TypeError(
            f"{callback} needs a module with encode(x) -> latents and decode(latents) -> x on raw "
            f"activations; {type(module).__name__} lacks one of them"
        )
    return view


def _one_of(module: LightningModule, sae: str | None) -> LightningModule:
    several = getattr(module, "dictionaries", None)
    if not isinstance(several, Mapping) or not several:
        return module
    if sae is not None and sae not in several:
        raise ValueError(f"sae={sae!r} is not in training; there are {', '.join(map(repr, several))}")
    chosen: LightningModule = several[sae] if sae is not None else next(iter(several.values()))
    return chosen


def choose_hook(names: Sequence[str], hook: str | None) -> str:
    """The hook point to look at: the named one, or the only one; "" where none has a name.

    Raises:
        ValueError: there are several and none was named, or the named one is not among them.
    """
    if hook is None and len(names) <= 1:
        return names[0] if names else ""
    if hook is None or (names and hook not in names):
        problem = "name one as hook=" if hook is None else f"hook={hook!r} is not among them"
        raise ValueError(f"the batches hold these hook points: {', '.join(names)}; {problem}")
    return hook


def side_by_side(rows: Mapping[str, Tensor], hooks: Sequence[str]) -> Tensor:
    """Rows of several hook points joined, `(n, sum of widths)`, float32."""
    return torch.cat([rows[hook].float() for hook in hooks], dim=-1)
