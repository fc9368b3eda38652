"""Do segments that share a model batch see each other? Asked of the model itself.

In: a function that runs the model. Out: the cheapest way of batching in which every row equals the row of
its segment alone. Equality, not a search for leaks: RoPE scaling by length leaks nothing and differs still.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from deeplens_lightning.options import Isolation

TOLERANCE = 1e-5
"""Relative error below which rows count as equal in float32."""


class Run(Protocol):
    """A forward pass, as `FrozenModel.activations`."""

    def __call__(
        self, tokens: Tensor, position_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Mapping[str, Tensor]:
        """Rows `(B, T, d_in)` by hook point."""
        ...


def relative_error(a: Tensor, b: Tensor) -> Tensor:
    """Per row of `(..., d)`: ‖a - b‖ / max(‖b‖, 1e-3 · median row norm), float32 `(rows,)`."""
    a, b = a.float().flatten(0, -2), b.float().flatten(0, -2)
    norms = b.norm(dim=1)
    floor = (1e-3 * norms.median()).clamp(min=torch.finfo(torch.float32).tiny)
    error: Tensor = (a - b).norm(dim=1) / torch.maximum(norms, floor)
    return error


def choose(run: Run, *, vocab_size: int, max_length: int | None, original: int | None) -> Isolation:
    """The first of packed, padded and equal in which rows equal those of the segment alone.

    Args:
        run: the model.
        vocab_size: token ids are drawn below this.
        max_length: the longest segment that the model takes.
        original: the context length from which on RoPE is scaled by length, where segments may reach it.

    Raises:
        ValueError: not even segments of equal length get along; the text says by how much.
    """
    probe = _Probe.draw(vocab_size, (5, 31, 1, 11), max_length)
    probes = [probe]
    if original is not None:
        probes.append(_Probe.draw(vocab_size, (original + 9, 5, original - 1), max_length))
    references = [probe.alone(run) for probe in probes]
    error = noise = 0.0
    tolerance = _floor(references[0])
    modes: tuple[Isolation, ...] = ("packed", "padded", "equal")
    for mode in modes:
        error = max(p.error(run, mode, r) for p, r in zip(probes, references, strict=True))
        if error > tolerance and not noise:  # what rounding alone does in this model, on this device
            noise = max(p.error(run, "equal", r) for p, r in zip(probes, references, strict=True))
            tolerance = max(tolerance, 4 * noise) if noise < 0.05 else tolerance
        if error <= tolerance:
            return mode
    raise ValueError(
        f"this model gives a segment other rows in a batch than alone (relative error {error:.1e}), even "
        "among segments of its length; run it with isolate_documents=False, or in float32"
    )


def _floor(rows: Sequence[Mapping[str, Tensor]]) -> float:
    """What counts as equal in the dtype of the rows."""
    eps = max(torch.finfo(x.dtype).eps for x in rows[0].values())
    return TOLERANCE if eps <= torch.finfo(torch.float32).eps else 8 * eps


@dataclass(frozen=True, slots=True)
class _Probe:
    """Random segments of unequal lengths."""

    segments: Sequence[Tensor]

    @classmethod
    def draw(cls, vocab_size: int, lengths: Iterable[int], max_length: int | None) -> _Probe:
        rng = np.random.default_rng(0)
        limit = max_length or 2**62
        low = min(10, vocab_size - 1)  # the first ids are often special, and padding has positions of its own
        return cls([torch.from_numpy(rng.integers(low, vocab_size, min(n, limit))) for n in lengths])

    def alone(self, run: Run) -> list[Mapping[str, Tensor]]:
        return [run(segment[None]) for segment in self.segments]

    def error(self, run: Run, mode: Isolation, references: Sequence[Mapping[str, Tensor]]) -> float:
        """The largest relative error of a segment's rows; in low precision, of its median row."""
        together: list[Mapping[str, Tensor]] = list(getattr(self, f"_{mode}")(run))
        worst = 0.0
        for rows, reference in zip(together, references, strict=True):
            for name, x in reference.items():
                errors = relative_error(rows[name], x)
                exact = x.dtype in (torch.float32, torch.float64)
                worst = max(worst, float(errors.max() if exact else errors.median()))
        return worst

    def _packed(self, run: Run) -> Iterable[Mapping[str, Tensor]]:
        pads = torch.zeros(4, dtype=torch.int64)
        rows = [[*self.segments, pads], [*reversed(self.segments), pads]]
        tokens = torch.stack([torch.cat(row) for row in rows])
        positions = torch.stack([torch.cat([torch.arange(len(part)) for part in row]) for row in rows])
        found = run(tokens, position_ids=positions)
        end = 0
        for segment in self.segments:
            start, end = end, end + len(segment)
            yield {name: x[:1, start:end] for name, x in found.items()}

    def _padded(self, run: Run) -> Iterable[Mapping[str, Tensor]]:
        tokens = torch.nn.utils.rnn.pad_sequence(list(self.segments), batch_first=True)
        lengths = torch.tensor([len(segment) for segment in self.segments])
        mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
        found = run(tokens, attention_mask=mask)
        for row, segment in enumerate(self.segments):
            yield {name: x[row : row + 1, : len(segment)] for name, x in found.items()}

    def _equal(self, run: Run) -> Iterable[Mapping[str, Tensor]]:
        for segment in self.segments:
            found = run(torch.stack([segment.flip(0), segment, segment.roll(1)]))
            yield {name: x[1:2] for name, x in found.items()}
