"""The validation set: a fixed number of held-out rows, the same rows in every run and in every pass.

In: held-out documents. Out: the rows of those with the smallest hashes, computed once and kept in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from deeplens_lightning.distributed import gather
from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.model.rows import run_model
from deeplens_lightning.text.packing import Blocks, TokenizedDocument, model_batches
from deeplens_lightning.text.pipeline import TextStage
from deeplens_lightning.types import PROVENANCE, Batch, Origins, Placement

SCANNED = 4
"""Number of held-out tokens to read for each requested row; limits how far the dataset is searched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutRows:
    """One rank's share of the validation set.

    Attributes:
        rows: raw rows `(n, d_in)` by hook point, in the dtype of the activations, on the CPU.
        provenance: int64 `(n, 4)`, columns as in `types.PROVENANCE`.
    """

    rows: dict[str, Tensor]
    provenance: Tensor

    def __len__(self) -> int:
        return len(self.provenance)


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationSet:
    """Choose the held-out documents of the validation set and compute their rows.

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

        Args:
            model: the frozen model.
            size: blocks per model batch, over all ranks.
            placement: rank and devices of this process.

        Returns:
            This rank's share. All ranks together have at most `rows` rows, rounded up to a multiple of the number of
            ranks.
        """
        parts = {
            point.name: [torch.empty(0, point.d_in, dtype=model.dtypes[point.name])]
            for point in model.hook_points
        }
        provenance = [torch.empty(0, len(PROVENANCE), dtype=torch.int64)]
        left = self.rows
        bar = tqdm(
            total=self.rows,
            desc="held-out rows",
            unit="row",
            unit_scale=True,
            disable=not placement.progress,
            leave=False,
        )
        with bar:
            for blocks in self.blocks():
                for index in model_batches(blocks, size, model.isolation):
                    everyone = int(blocks.keep[index].sum())
                    mine = blocks.select(index[placement.rank :: placement.ranks])
                    if len(mine):
                        batch = run_model(model, mine)
                        share = -(-left // placement.ranks)
                        for name, x in batch.activations.items():
                            parts[name].append(x.index_select(0, batch.kept[:share].to(x.device)).cpu())
                        provenance.append(batch.provenance[:share])
                    bar.update(min(left, everyone))
                    left -= everyone
                    if left <= 0:
                        break
        rows = {name: torch.cat(tensors) for name, tensors in parts.items()}
        return HeldOutRows(rows=rows, provenance=torch.cat(provenance))


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
        self._length: int | None = None

    def __len__(self) -> int:
        if (
            self._length is None
        ):  # stored, because after an exception Lightning reads it when the rows are freed
            self._length = max(gather(-(-len(self._rows()) // self._batch_size)))
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        length = len(self)  # the same on all ranks: some strategies communicate at every batch
        heldout = self._rows()
        total = len(heldout)
        size = self._batch_size if total > (length - 1) * self._batch_size else -(-total // max(1, length))
        for number in range(length):
            part = slice(number * size, (number + 1) * size)
            batch = self._finish({name: x[part] for name, x in heldout.rows.items()})
            self._seen(batch, partial(heldout.provenance.__getitem__, part))
            yield batch
