"""Choose how segments share a model batch, so that each row equals that of its segment alone.

In: a function that runs the model. Out: the cheapest kind of model batch ("packed", "padded" or "equal") in which
random segments give the same rows as alone. The rows themselves are compared. A test of whether one segment influences
another would not be enough: with RoPE scaling by length the rows change although no segment influences another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from deeplens_lightning.options import Isolation

TOLERANCE = 1e-5
"""Relative error up to which rows count as equal in float32."""


class Run(Protocol):
    """A forward pass with the arguments of `FrozenModel.activations`."""

    def __call__(
        self, tokens: Tensor, position_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Mapping[str, Tensor]:
        """Activations `(B, T, d_in)` by hook point."""
        ...


def relative_error(a: Tensor, b: Tensor) -> Tensor:
    """Relative error of `a` for each row: ‖a - b‖ / max(‖b‖, 1e-3 · median norm of the rows of b).

    Args:
        a: `(..., d)`, any float dtype.
        b: the reference, of the same shape.

    Returns:
        float32 `(rows,)`.
    """
    a, b = a.float().flatten(0, -2), b.float().flatten(0, -2)
    norms = b.norm(dim=1)
    floor = (1e-3 * norms.median()).clamp(min=torch.finfo(torch.float32).tiny)
    error: Tensor = (a - b).norm(dim=1) / torch.maximum(norms, floor)
    return error


def choose(run: Run, *, vocab_size: int, max_length: int | None, original: int | None) -> Isolation:
    """The first of "packed", "padded" and "equal" in which rows equal those of the segment alone.

    Args:
        run: runs the model.
        vocab_size: random token ids are below this number.
        max_length: the longest segment that the model takes, in tokens; None if there is no limit.
        original: the length beyond which RoPE frequencies depend on the sequence length, if segments can be longer;
            else None.

    Raises:
        ValueError: rows differ even in model batches of segments of equal length; the message has the error.
    """
    probe = _Probe.draw(vocab_size, (5, 31, 1, 11), max_length)
    probes = [probe]
    if original is not None:
        probes.append(_Probe.draw(vocab_size, (original + 9, 5, original - 1), max_length))
    references = [probe.alone(run) for probe in probes]
    error = noise = 0.0
    tolerance = _tolerance(references[0])
    modes: tuple[Isolation, ...] = ("packed", "padded", "equal")
    for mode in modes:
        error = max(p.error(run, mode, r) for p, r in zip(probes, references, strict=True))
        if error > tolerance and not noise:  # the error of rounding in this model, on this device
            noise = max(p.error(run, "equal", r) for p, r in zip(probes, references, strict=True))
            tolerance = max(tolerance, 4 * noise) if noise < 0.05 else tolerance
        if error <= tolerance:
            return mode
    raise ValueError(
        f"this model gives a segment different rows in a model batch than alone (relative error {error:.1e}), even "
        "with segments of equal length; run it in float32, or accept that segments influence each other with "
        'model_options.isolation="none"'
    )


def _tolerance(rows: Sequence[Mapping[str, Tensor]]) -> float:
    """The relative error up to which rows of this dtype count as equal."""
    eps = max(torch.finfo(x.dtype).eps for x in rows[0].values())
    return TOLERANCE if eps <= torch.finfo(torch.float32).eps else 8 * eps


@dataclass(frozen=True, slots=True)
class _Probe:
    """Random segments of unequal lengths, int64 `(length,)` each."""

    segments: Sequence[Tensor]

    @classmethod
    def draw(cls, vocab_size: int, lengths: Iterable[int], max_length: int | None) -> _Probe:
        """Segments of these lengths, cut to `max_length`, with the same token ids in every run."""
        rng = np.random.default_rng(0)
        limit = max_length or 2**62
        low = min(
            10, vocab_size - 1
        )  # the first ids are often special tokens, some with positions of their own
        return cls([torch.from_numpy(rng.integers(low, vocab_size, min(n, limit))) for n in lengths])

    def alone(self, run: Run) -> list[Mapping[str, Tensor]]:
        """Activations `(1, length, d_in)` of each segment, each in a forward pass of its own."""
        return [run(segment[None]) for segment in self.segments]

    def error(self, run: Run, mode: Isolation, references: Sequence[Mapping[str, Tensor]]) -> float:
        """The largest relative error of any row; in low precision, the largest median over a segment's rows."""
        ways: dict[Isolation, Callable[[Run], Iterable[Mapping[str, Tensor]]]] = {
            "packed": self._packed,
            "padded": self._padded,
            "equal": self._equal,
        }
        together = list(ways[mode](run))
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
