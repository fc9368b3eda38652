"""Interleaved timing: two contenders take turns in one process, so that a busy machine slows both."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table: seconds for a unit of `rows` rows, pair by pair."""

    name: str
    rows: int
    ours: list[float]
    theirs: list[float]

    @property
    def ratio(self) -> float:
        """Median over pairs of how many times faster ours is."""
        return median(b / a for a, b in zip(self.ours, self.theirs, strict=True))

    def summary(self) -> dict[str, float | str]:
        """Medians in rows a second, and the ratio."""
        ours, theirs = self.rows / median(self.ours), self.rows / median(self.theirs)
        return {
            "measure": self.name,
            "ours_rows_per_s": ours,
            "saelens_rows_per_s": theirs,
            "ratio": self.ratio,
        }


def take_turns(
    name: str,
    rows: int,
    ours: Callable[[], object],
    theirs: Callable[[], object],
    *,
    pairs: int,
    warmup: int,
    cuda: bool,
) -> Line:
    """Time units of both, alternating, and alternating who goes first."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for i in range(warmup + pairs):
        for which in (0, 1) if i % 2 else (1, 0):
            elapsed = _time((ours, theirs)[which], cuda=cuda)
            if i >= warmup:
                seconds[which].append(elapsed)
    line = Line(name, rows, *seconds)
    print(
        "{measure:28s} {ours_rows_per_s:10.0f} {saelens_rows_per_s:10.0f} {ratio:8.2f}x".format(
            **line.summary()
        ),
        flush=True,
    )
    return line


def _time(unit: Callable[[], object], *, cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    unit()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
