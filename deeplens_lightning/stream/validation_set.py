"""The validation and the test set: a fixed number of held-out rows, the same rows in every run and in every pass.

In: held-out documents. Out: the rows of those with the smallest hashes, computed once and kept in memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from deeplens_lightning.activation_data import NotSetUpError
from deeplens_lightning.devices import on_device
from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.model.rows import run_model
from deeplens_lightning.text.packing import Blocks, TokenizedDocument, model_batches
from deeplens_lightning.text.pipeline import TextStage
from deeplens_lightning.types import PROVENANCE, Batch, Origins, Placement, key_of

SCANNED = 4
"""Number of held-out tokens to read for each requested row; limits how far the dataset is searched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutRows:
    """One rank's share of the validation or the test set.

    Attributes:
        rows: raw rows `(n, d_in)` by hook point, in the dtype of the activations, on the CPU.
        provenance: int64 `(n, 4)`, columns as in `types.PROVENANCE`.
        longest: the largest number of rows that a rank has.
    """

    rows: dict[str, Tensor]
    provenance: Tensor
    longest: int

    def __len__(self) -> int:
        return len(self.provenance)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Share:
    """The blocks of a model batch that this rank runs, and the number of first rows that it and each rank keeps."""

    blocks: Blocks
    rows: int
    rows_by_rank: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationSet:
    """Choose the held-out documents of the validation or the test set and compute their rows.

    Attributes:
        text: the text of the held-out split, the whole split on every rank (rank 0 of 1), packed as in training.
        rows: requested number of rows, over all ranks.
    """

    text: TextStage
    rows: int

    def chosen(self) -> list[TokenizedDocument]:
        """The first held-out documents with `SCANNED * rows` tokens in all, sorted by their hashes."""
        scanned, tokens = [], 0
        for document in self.text.tokenized(0):
            scanned.append(document)
            tokens += len(document.tokens)
            if tokens >= SCANNED * self.rows:
                break
        return sorted(scanned, key=lambda document: np.uint64(document.hash & (2**64 - 1)))

    def blocks(self) -> Iterator[Blocks]:
        """Iterate over chunks of blocks of the chosen documents until they hold the requested number of rows."""
        kept = 0
        for chunk in self.text.packing.chunks(self.chosen()):
            yield chunk.blocks
            kept += int(chunk.blocks.keep.sum())
            if kept >= self.rows:
                return

    def compute(self, model: FrozenModel, size: int, placement: Placement) -> HeldOutRows:
        """Compute this rank's rows: the model runs on every `ranks`-th block of each model batch.

        The rows are counted first, so that they are allocated once.

        Args:
            model: the frozen model.
            size: blocks per model batch, over all ranks.
            placement: rank and devices of this process.

        Returns:
            This rank's share. All ranks together have the same rows, at most `rows`, for any number of ranks.
        """
        shares = list(self._shares(model, size, placement))
        total = sum(share.rows for share in shares)
        rows = {
            point.name: torch.empty(total, point.d_in, dtype=model.dtypes[point.name])
            for point in model.hook_points
        }
        provenance = torch.empty(total, len(PROVENANCE), dtype=torch.int64)
        bar = tqdm(
            total=total,
            desc="held-out rows",
            unit="row",
            unit_scale=True,
            disable=not placement.progress,
            leave=False,
        )
        at = 0
        with bar:
            for share in shares:
                if not share.rows:
                    continue
                batch, here = run_model(model, share.blocks), slice(at, at + share.rows)
                for name, x in batch.activations.items():
                    rows[name][here] = x.index_select(0, on_device(batch.kept[: share.rows], x.device))
                provenance[here] = batch.provenance[: share.rows]
                at += share.rows
                bar.update(share.rows)
        counts = zip(*(share.rows_by_rank for share in shares), strict=True)
        return HeldOutRows(rows=rows, provenance=provenance, longest=max(map(sum, counts), default=0))

    def _shares(self, model: FrozenModel, size: int, placement: Placement) -> Iterator[_Share]:
        """This rank's blocks of each model batch, and how many of their rows belong to the validation set."""
        left = self.rows
        for blocks in self.blocks():
            for index in model_batches(blocks, size, model.isolation):
                counts = blocks.keep[index].sum(1)
                taken = torch.minimum(counts, (left - (counts.cumsum(0) - counts)).clamp(min=0))
                by_rank = tuple(int(taken[rank :: placement.ranks].sum()) for rank in range(placement.ranks))
                mine = blocks.select(index[placement.rank :: placement.ranks])
                yield _Share(blocks=mine, rows=by_rank[placement.rank], rows_by_rank=by_rank)
                left -= int(counts.sum())
                if left <= 0:
                    return


class RowsLoader:
    """Serve fixed rows in batches, the same batches in every pass; the rows are computed when first needed.

    Args:
        rows: returns the rows.
        batch_size: rows per batch.
        finish: scales and casts a batch.
        seen: called with every batch and a function that returns its provenance, int64 `(batch, 4)`.
    """

    def __init__(
        self,
        rows: Callable[[], HeldOutRows],
        batch_size: int,
        finish: Callable[[dict[str, Tensor]], Batch],
        seen: Callable[[Batch, Origins], None],
    ) -> None:
        self._rows, self._batch_size, self._finish, self._seen = rows, batch_size, finish, seen
        self._length: int | None = None  # kept after the rows are freed
        self._recent: deque[tuple[Batch, Origins]] = deque(maxlen=2)

    def __len__(self) -> int:
        """Number of batches, the same on all ranks: some strategies communicate at every batch.

        Lightning takes a TypeError or NotImplementedError of this method for a loader without a length. After an
        exception it calls the method again, when the rows are freed, and would raise any other error in its place.

        Raises:
            TypeError: the rows are not computed yet and the data module is closed.
            RuntimeError: computing the rows failed with a TypeError or NotImplementedError.
        """
        if self._length is None:
            try:
                self._length = -(-self._rows().longest // self._batch_size)
            except NotSetUpError as error:
                raise TypeError(f"the number of validation batches is not known: {error}") from error
            except (TypeError, NotImplementedError) as error:
                raise RuntimeError(f"computing the held-out rows failed: {error!r}") from error
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        heldout = self._rows()
        length, total = len(self), len(heldout)
        size = self._batch_size if total > (length - 1) * self._batch_size else -(-total // max(1, length))
        for number in range(length):
            part = slice(number * size, (number + 1) * size)
            # copies, because a module may write into its batch
            batch = self._finish({name: x[part].clone() for name, x in heldout.rows.items()})
            origins = partial(heldout.provenance.__getitem__, part)
            self._seen(batch, origins)
            self._recent.append((batch, origins))
            yield batch

    def origins(self, batch: Batch) -> Origins | None:
        """Provenance of one of the last two batches served, which may have been cast since; found by its values."""
        x = key_of(batch)
        for served, origins in reversed(self._recent):
            y = key_of(served)
            if x.shape == y.shape and torch.equal(x[:1].nan_to_num(), y[:1].to(x.dtype).nan_to_num()):
                return origins
        return None
