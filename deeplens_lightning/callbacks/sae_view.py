"""Find the SAE in the module that trains, and run it on raw activations by hook point.

Autoencoders, transcoders and crosscoders differ in the hook points that they read and write, a grid trains several
SAEs, and a user's own module may have no notion of hook points. `SaeView` hides these differences from the callbacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from deeplens_lightning.sae import Dictionary
from deeplens_lightning.sae.training import DictionaryTraining

_ENTRIES = 2**25  # of dense latents at a time, 128 MB in float32: a batch of a wide SAE has gigabytes


@runtime_checkable
class Encodes(Protocol):
    """A module with the methods `encode` and `decode` on raw activations."""

    def encode(self, x: Any) -> Tensor:
        """Return latents `(n, d_sae)` of raw rows `(n, d_in)`."""
        ...

    def decode(self, latents: Tensor) -> Any:
        """Return raw rows `(n, d_in)` of latents `(n, d_sae)`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SaeView:
    """An SAE with its hook points: encode and reconstruct raw rows given by hook point.

    Attributes:
        module: the SAE.
        name: its name among the SAEs of a grid; "" for a single SAE.
        reconstruction: raw rows to raw reconstructions; a Tensor, or a dict by hook point.
        reads: canonical names of the hook points that it encodes.
        writes: canonical names of the hook points that it reconstructs.
        device: the device of its weights.
    """

    module: Encodes
    name: str
    reconstruction: Callable[[Any], Any]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    device: torch.device

    @property
    def hooks(self) -> tuple[str, ...]:
        """All hook points that it reads or writes, each once."""
        return tuple(dict.fromkeys(self.reads + self.writes))

    def encode(self, rows: Mapping[str, Tensor]) -> Tensor:
        """Latents `(n, d_sae)` of raw rows `(n, d_in)` by hook point."""
        return self.module.encode(self._input(rows))

    def encode_parts(self, rows: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """Latents `(m, d_sae)` of one part of the rows after another, each with at most 2²⁵ entries."""
        return map(self.encode, self._parts(rows))

    def reconstruct(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Raw reconstructions `(n, d_in)` by hook point written, from raw rows `(n, d_in)` by hook point read."""
        parts = [self._reconstruct(part) for part in self._parts(rows)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _reconstruct(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        out = self.reconstruction(self._input(rows))
        return dict(out) if isinstance(out, Mapping) else {self.writes[0]: out}

    def _parts(self, rows: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Consecutive parts of rows by hook point; all of them at once where the number of latents is not known."""
        count = len(next(iter(rows.values())))
        size = max(1, _ENTRIES // self.module.d_sae) if isinstance(self.module, Dictionary) else max(1, count)
        for start in range(0, max(1, count), size):
            yield {name: x[start : start + size] for name, x in rows.items()}

    def _input(self, rows: Mapping[str, Tensor]) -> Tensor | dict[str, Tensor]:
        if len(self.reads) == 1:
            return rows[self.reads[0]]
        return {name: rows[name] for name in self.reads}


def find_sae(
    module: nn.Module, names: Sequence[str], hook: str | None = None, sae: str | None = None
) -> SaeView | None:
    """Find the SAE of a module; None where it has no `encode` and `decode`.

    Args:
        module: the LightningModule that trains, or an SAE.
        names: canonical names of the hook points that batches hold; empty where unknown.
        hook: the hook point that the module reads, if neither the module nor the batches determine it.
        sae: name of one SAE of a module that trains several (`dictionaries`); default the first.

    Raises:
        ValueError: batches hold several hook points, and neither the module nor `hook` chooses one; or no SAE is
            called `sae`.
    """
    name, chosen = _choose_dictionary(module, sae)
    if isinstance(chosen, Dictionary):
        return SaeView(
            module=chosen,
            name=name,
            reconstruction=chosen,  # not decode(encode(x)): a skip connection is only in the forward pass
            reads=tuple(name or choose_hook(names, hook) for name in chosen.read.hooks),
            writes=tuple(name or choose_hook(names, hook) for name in chosen.write.hooks),
            device=_device(module),
        )
    if not isinstance(chosen, Encodes):
        return None
    own, one = chosen, (choose_hook(names, hook),)
    return SaeView(
        module=own,
        name=name,
        reconstruction=lambda x: own.decode(own.encode(x)),
        reads=one,
        writes=one,
        device=_device(module),
    )


def require_sae(module: nn.Module, names: Sequence[str], callback: str, sae: str | None = None) -> SaeView:
    """Find the SAE of a LightningModule, or raise an error that names the callback.

    Args:
        module: the LightningModule that trains.
        names: canonical names of the hook points that batches hold; empty where unknown.
        callback: name of the callback that needs the SAE, for the error message.
        sae: name of one SAE of a module that trains several, such as `k=32`; default the first.

    Raises:
        TypeError: the module has no `encode` or no `decode`.
        ValueError: batches hold several hook points and the module does not choose one; or no SAE is called `sae`.
    """
    view = find_sae(module, names, sae=sae)
    if view is None:
        raise TypeError(
            f"{callback} needs a module with encode(x) -> latents and decode(latents) -> x on raw "
            f"activations; {type(module).__name__} lacks one of them: add the missing method"
        )
    return view


def _choose_dictionary(module: nn.Module, sae: str | None) -> tuple[str, nn.Module]:
    """The SAE of that name, or the first one, with its name; a module of another kind itself, without a name."""
    several: Mapping[str, nn.Module] = (
        module.dictionaries if isinstance(module, DictionaryTraining) else {"": module}
    )
    if sae is None:
        return next(iter(several.items()))
    if "" in several:
        raise ValueError(
            f"sae={sae!r} names an SAE of a grid, and {type(module).__name__} has one without a name: leave sae out"
        )
    if sae not in several:
        raise ValueError(f"sae={sae!r} is not in training; there are {', '.join(map(repr, several))}")
    return sae, several[sae]


def _device(module: nn.Module) -> torch.device:
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def choose_hook(names: Sequence[str], hook: str | None) -> str:
    """Choose one hook point: `hook` if given, else the only one of `names`; "" where `names` is empty too.

    Raises:
        ValueError: there are several and `hook` is None, or `hook` is not among them.
    """
    if hook is None and len(names) <= 1:
        return names[0] if names else ""
    if hook is None or (names and hook not in names):
        problem = "name one as hook=" if hook is None else f"hook={hook!r} is not among them"
        raise ValueError(f"the batches hold these hook points: {', '.join(names)}; {problem}")
    return hook


def side_by_side(rows: Mapping[str, Tensor], hooks: Sequence[str]) -> Tensor:
    """Concatenate the rows of several hook points: float32 `(n, sum of widths)`."""
    return torch.cat([rows[hook].float() for hook in hooks], dim=-1)
