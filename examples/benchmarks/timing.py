"""Time two functions in turns in one process, so that other load on the machine slows both equally."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table: for each pair of turns, the seconds of each library for `rows` rows."""

    name: str
    rows: int
    ours: list[float]
    theirs: list[float]

    @property
    def ratio(self) -> float:
        """Speed of ours divided by speed of theirs, the median over pairs of turns."""
        return median(b / a for a, b in zip(self.ours, self.theirs, strict=True))

    def summary(self) -> dict[str, float | str]:
        """Median rates in rows per second, and the ratio."""
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
    """Time two functions in alternating turns; which one goes first also alternates.

    Args:
        name: name of the measurement.
        rows: rows that one call processes.
        ours: a function that does one unit of work with this library.
        theirs: a function that does the same work with the other library.
        pairs: number of pairs of turns that are counted.
        warmup: number of pairs before them that are not counted.
        cuda: whether to synchronise CUDA before and after each call.
    """
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
