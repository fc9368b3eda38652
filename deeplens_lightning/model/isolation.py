"""Choose how segments share a model batch, so that each row equals that of its segment alone.

In: a function that runs the model. Out: the cheapest kind of model batch ("packed", "padded" or "equal") in which
random segments give the same rows as alone. The rows themselves are compared. A test of whether one segment influences
another would not be enough: with RoPE scaling by length the rows change although no segment influences another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from deeplens_lightning.options import Isolation

TOLERANCE = 1e-5
"""Relative error up to which rows count as equal in float32."""

MAX_ROUNDING = 5e-4
"""Largest relative error that is ever put down to rounding in float32. The smallest known leak is 9e-4."""

MAX_UNSTABLE = 0.05
"""Largest relative error of rows in model batches of equal length, where nothing but rounding can be the cause."""

ROUGH_TOLERANCE = 0.0625
"""Relative error of a segment's median row up to which rows count as equal in lower precision."""

MODES: tuple[Isolation, ...] = ("packed", "padded", "equal")
"""The kinds of model batch that keep segments apart, the cheapest first."""

_SHORT = (5, 31, 1, 11)
"""Lengths in tokens of the segments that every model is probed with, if a block has room for them."""

_WHOLE_BLOCK = 4096
"""Blocks of at most this number of positions are probed whole, if a length of the model is reached in them."""


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


def choose(
    run: Run,
    *,
    vocab_size: int,
    block: int,
    lengths: Iterable[int] = (),
    modes: Sequence[Isolation] = MODES,
    exact: bool = True,
) -> Isolation:
    """The first of some kinds of model batch in which rows equal those of the segment alone.

    The worst row decides. Rounding may be larger on some devices: the error in model batches of equal length, where
    nothing but rounding differs, is measured if needed and allowed four times, up to `MAX_ROUNDING`. In a model that
    selects the largest of some values, rounding may select others and make a larger error; this is accepted in model
    batches of equal length only, up to `MAX_UNSTABLE`.

    Args:
        run: runs the model.
        vocab_size: random token ids are below this number.
        block: positions of a block, and the longest segment, in tokens.
        lengths: lengths in tokens from which on the model may compute differently. In the probe a segment, and the
            place of a segment in its block, go past each of those that a block reaches.
        modes: the kinds of model batch to choose from, the cheapest first.
        exact: False if the model runs in lower precision. The median row of each segment is then compared with
            `ROUGH_TOLERANCE`, which finds only large errors.

    Raises:
        ValueError: rows differ in each of these kinds of model batch; the message has the error.
    """
    probes = [_Probe.short(vocab_size, block)]
    reached = [length for length in lengths if probes[0].longest <= length <= block]
    if reached:
        probes.append(_Probe.past(max(reached), vocab_size, block))
    references = [probe.alone(run) for probe in probes]

    def worst(mode: Isolation) -> float:
        return max(p.error(run, mode, r, exact) for p, r in zip(probes, references, strict=True))

    tolerance, rounding, unstable = ROUGH_TOLERANCE, 2 * ROUGH_TOLERANCE, 2 * ROUGH_TOLERANCE
    if exact:
        tolerance, rounding, unstable = TOLERANCE, MAX_ROUNDING, MAX_UNSTABLE
    errors: dict[Isolation, float] = {}
    for mode in modes:
        errors[mode] = worst(mode)
        if errors[mode] > tolerance and "equal" not in errors:
            errors["equal"] = worst("equal")
            tolerance = max(tolerance, min(4 * errors["equal"], rounding))
        if errors[mode] <= (unstable if mode == "equal" else tolerance):
            return mode
    advice = "accept" if exact else "run it in float32, or accept"
    raise ValueError(
        "this model gives a segment different rows in a model batch than alone (relative error "
        f"{errors[modes[-1]]:.1e}), even with segments of equal length; {advice} that segments influence each other "
        'with model_options.isolation="none"'
    )


@dataclass(frozen=True, slots=True)
class _Probe:
    """Random segments, int64 `(length,)` each, and the packed rows that hold them, as numbers of segments."""

    segments: Sequence[Tensor]
    rows: Sequence[Sequence[int]]
    pads: int = 0

    @classmethod
    def short(cls, vocab_size: int, block: int) -> _Probe:
        """Segments of unequal lengths, twice in different order."""
        total = min(block, sum(_SHORT))
        scaled = [max(1, length * total // sum(_SHORT)) for length in _SHORT]
        segments = _draw(
            [n for n, end in zip(scaled, accumulate(scaled), strict=True) if end <= block], vocab_size
        )
        order = list(range(len(segments)))
        return cls(segments, [order, order[::-1]], pads=min(4, block - sum(map(len, segments))))

    @classmethod
    def past(cls, length: int, vocab_size: int, block: int) -> _Probe:
        """A segment longer than `length`, and segments that lie past it in a block or across it."""
        length = min(length, block - 1)
        positions = min(block, max(_WHOLE_BLOCK, length + length // 4 + 64))
        first = min(5, positions - 1 - length)
        ends = (length // 3, length - length // 6, length + length // 6 + 1)
        cuts = sorted({0, *(min(end, positions) for end in ends), positions})
        lengths = [n for n in (first, positions - first) if n]
        inner = [b - a for a, b in pairwise(cuts)]
        order = list(range(len(lengths) + len(inner)))
        return cls(_draw([*lengths, *inner], vocab_size), [order[: len(lengths)], order[len(lengths) :]])

    @property
    def longest(self) -> int:
        return max(map(len, self.segments))

    def alone(self, run: Run) -> list[Mapping[str, Tensor]]:
        """Activations `(1, length, d_in)` of each segment, each in a forward pass of its own."""
        return [run(segment[None]) for segment in self.segments]

    def error(
        self, run: Run, mode: Isolation, references: Sequence[Mapping[str, Tensor]], exact: bool
    ) -> float:
        """The largest relative error of any row; if not `exact`, the largest median over a segment's rows."""
        ways: dict[Isolation, Callable[[Run], Iterable[tuple[int, Mapping[str, Tensor]]]]] = {
            "packed": self._packed,
            "padded": self._padded,
            "equal": self._equal,
        }
        worst = 0.0
        for index, rows in ways[mode](run):
            for name, x in references[index].items():
                errors = relative_error(rows[name], x).nan_to_num(torch.inf)
                worst = max(worst, float(errors.max() if exact else errors.median()))
        return worst

    def _packed(self, run: Run) -> Iterable[tuple[int, Mapping[str, Tensor]]]:
        pads = torch.zeros(self.pads, dtype=torch.int64)
        rows = [[*(self.segments[index] for index in row), pads] for row in self.rows]
        tokens = torch.stack([torch.cat(row) for row in rows])
        positions = torch.stack([torch.cat([torch.arange(len(part)) for part in row]) for row in rows])
        found = run(tokens, position_ids=positions)
        for row, members in enumerate(self.rows):
            end = 0
            for index in members:
                start, end = end, end + len(self.segments[index])
                yield index, {name: x[row : row + 1, start:end] for name, x in found.items()}

    def _padded(self, run: Run) -> Iterable[tuple[int, Mapping[str, Tensor]]]:
        tokens = torch.nn.utils.rnn.pad_sequence(list(self.segments), batch_first=True)
        lengths = torch.tensor([len(segment) for segment in self.segments])
        mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
        found = run(tokens, attention_mask=mask)
        for index, segment in enumerate(self.segments):
            yield index, {name: x[index : index + 1, : len(segment)] for name, x in found.items()}

    def _equal(self, run: Run) -> Iterable[tuple[int, Mapping[str, Tensor]]]:
        for index, segment in enumerate(self.segments):
            found = run(torch.stack([segment.flip(0), segment, segment.roll(1)]))
            yield index, {name: x[1:2] for name, x in found.items()}


def _draw(lengths: Iterable[int], vocab_size: int) -> list[Tensor]:
    """Segments of these lengths, with the same token ids in every run."""
    rng = np.random.default_rng(0)
    low = min(10, vocab_size - 1)  # the first ids are often special tokens, some with positions of their own
    return [torch.from_numpy(rng.integers(low, vocab_size, n)) for n in lengths]
