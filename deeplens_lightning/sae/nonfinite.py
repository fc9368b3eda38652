"""Leave out rows with NaN or Inf, count them over all ranks, and raise an error on all ranks that names the first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from deeplens_lightning.distributed import gather, sum_over_ranks, world_size

CHECK_EVERY = 100  # batches on an accelerator, if logging steps are rarer

Describe: TypeAlias = Callable[[int], str]
"""From the number of a row in its batch to a description of its place, for error messages."""


class NonFiniteRowsError(ValueError):
    """Rows hold NaN or infinity."""


@torch.no_grad()
def replace_nonfinite(x: Tensor, y: Tensor, neutral: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Replace rows that hold NaN or infinity, without waiting for an accelerator.

    Args:
        x: `(batch, d_read)`, rows to read.
        y: `(batch, d_write)`, rows to reconstruct; the same tensor as x in an autoencoder.
        neutral: `(d_write,)`, replaces rows of y: the decoder's bias, from which nothing is learned.

    Returns:
        x and y with the rows replaced, in x by zeros unless x is y; and bool `(batch,)`, which rows these are. On the CPU
        None instead, if there are none.
    """
    if x.device.type == "cpu" and torch.isfinite(x.sum() + y.sum()):  # a sum is finite only if every term is
        return x, y, None
    bad = ~(x.isfinite().all(1) & y.isfinite().all(1))
    clean_y = torch.where(bad[:, None], neutral, y)
    if y is x:
        return clean_y, clean_y, bad
    return torch.where(bad[:, None], torch.zeros_like(x), x), clean_y, bad


def count_over_ranks(x: Tensor, bad: Tensor | None) -> tuple[Tensor | int, Tensor | int]:
    """Number of rows of one batch of every rank, and of those with NaN or infinity; all ranks get the same numbers.

    A collective operation that does not wait for an accelerator.

    Args:
        x: this rank's batch, `(batch, d)`.
        bad: bool `(batch,)`, its rows with NaN or infinity; None for no row.
    """
    if world_size() == 1:
        return len(x), 0 if bad is None else bad.sum()
    rows = torch.full((), len(x), dtype=torch.int64, device=x.device)
    found = torch.zeros_like(rows) if bad is None else bad.sum()
    total, skipped = sum_over_ranks(torch.stack([rows, found]))
    return total, skipped


def mean_over_finite_ranks(x: Tensor) -> Tensor:
    """Average over the ranks on which x is finite, elementwise; on one rank x itself. Not finite where no rank's x is."""
    if world_size() == 1:
        return x
    finite = x.isfinite()
    total, ranks = sum_over_ranks(torch.stack([torch.where(finite, x, 0), finite.to(x.dtype)]))
    mean: Tensor = total / ranks
    return mean


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """Rows of one rank: how many, how many with NaN or infinity, and the first of these: its batch and its place."""

    rows: int
    count: int
    batch: int
    place: str


class NonFiniteRows:
    """Rows with NaN or infinity since the last check: how many, and the first one's place.

    Adding a batch does not wait for an accelerator; the numbers stay on its device until the next check.

    Args:
        kind: what the rows are, for error messages.
    """

    _found: Tensor | None  # int64 (3,): number of these rows, batch and row of the first
    _describe: list[Describe | None]
    _rows: int

    def __init__(self, kind: str = "rows") -> None:
        self.kind = kind
        self._start_over()

    def __len__(self) -> int:
        """Number of batches since the last check."""
        return len(self._describe)

    def watch(self, bad: Tensor | None, rows: int, anywhere: Tensor | int, describe: Describe | None) -> None:
        """Add a training batch, and check: on the CPU at once, on an accelerator after `CHECK_EVERY` batches.

        All ranks must call it at the same time.

        Args:
            bad: bool `(batch,)`, which rows hold NaN or infinity; None for no row, on the CPU.
            rows: number of rows of the batch.
            anywhere: number of such rows in the batches of all ranks.
            describe: from the number of a row in the batch to its place.

        Raises:
            NonFiniteRowsError: there are such rows on any rank.
        """
        self.add(bad, rows, describe)
        on_cpu = bad is None or bad.device.type == "cpu"
        if on_cpu and not anywhere:
            self._start_over()
        elif on_cpu or len(self) >= CHECK_EVERY:
            self.check()

    @torch.no_grad()
    def add(self, bad: Tensor | None, rows: int, describe: Describe | None) -> None:
        """Add a batch; the arguments are those of `watch`."""
        if bad is not None and rows:  # a rank with fewer rows gets empty batches
            count = bad.sum()
            found = torch.stack([count, torch.full_like(count, len(self)), bad.int().argmax()])
            if self._found is not None:
                first = torch.where(self._found[0] > 0, self._found, found)
                found = torch.stack([self._found[0] + count, first[1], first[2]])
            self._found = found
        self._describe.append(describe)
        self._rows += rows

    def check(self) -> None:
        """Raise the same error on all ranks if any of them added a row with NaN or infinity, and start over.

        A collective operation, which waits for the device.

        Raises:
            NonFiniteRowsError: there are such rows; it names the rank, if there are several, and the first one's place.
        """
        count, batch, row = self._found.tolist() if self._found is not None else (0, 0, 0)
        describe = self._describe[batch] if count else None
        place = describe(row) if describe else f"first is row {row}"
        ranks = gather(_Found(rows=self._rows, count=count, batch=batch, place=place))
        self._start_over()
        bad = [(found.batch, rank) for rank, found in enumerate(ranks) if found.count]
        if not bad:
            return
        _, rank = min(bad)
        where = f"rank {rank}, {ranks[rank].place}" if len(ranks) > 1 else place
        total, rows = sum(found.count for found in ranks), sum(found.rows for found in ranks)
        raise NonFiniteRowsError(
            f"{total} of {rows} {self.kind} hold NaN or infinity ({where}); find out why the model computes them "
            "(usually float16 overflow: try bfloat16), or leave these rows out with on_nonfinite='skip'"
        )

    def _start_over(self) -> None:
        self._found, self._describe, self._rows = None, [], 0
