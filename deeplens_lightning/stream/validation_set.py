"""The validation set: a fixed number of held-out rows, the same on every run, rewinding on every pass.

In: held-out documents. Out: rows of the ones with the smallest hashes, computed once and kept in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from deeplens_lightning.distributed import gather
from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.model.rows import run_model
from deeplens_lightning.text.documents import Documents
from deeplens_lightning.text.packing import Blocks, Packing, TokenizedDocument, model_batches
from deeplens_lightning.types import PROVENANCE

SCANNED = 4
"""Held-out tokens looked at for each one wanted: the bound on the scan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heldout:
    """Which held-out documents make up the validation set.

    Attributes:
        documents: of the held-out split, all of them, read as rank 0 of 1.
        packing: as in training.
        rows: wanted.
    """

    documents: Documents
    packing: Packing
    rows: int

    def chosen(self) -> list[TokenizedDocument]:
        """By hash, among the first documents that hold `SCANNED` times the tokens wanted."""
        scanned, tokens = [], 0
        for document in self.documents.read(0):
            scanned.append(document)
            tokens += len(document.tokens)
            if tokens >= SCANNED * self.rows:
                break
        return sorted(scanned, key=lambda document: np.uint64(document.hash & (2**64 - 1)))

    def blocks(self) -> Iterator[Blocks]:
        """Chunks of blocks of the chosen documents, until there are rows enough."""
        kept = 0
        for chunk in self.packing.chunks(self.chosen()):
            yield chunk.blocks
            kept += int(chunk.blocks.keep.sum())
            if kept >= self.rows:
                return

    def compute(
        self, model: FrozenModel, size: int, *, rank: int, ranks: int, progress: bool
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Run the model over this rank's share: every `ranks`-th block of each model batch.

        Args:
            model: see `ActivationStream`.
            size: blocks a model batch.
            rank: this one.
            ranks: of how many.
            progress: show a bar.

        Returns:
            Raw rows `(n, d_in)` by hook point and provenance `(n, 4)`, on the CPU; over all ranks at most
            `rows` of them, rounded up to a multiple of the ranks.
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
            disable=not progress,
            leave=False,
        )
        with bar:
            for blocks in self.blocks():
                for index in model_batches(blocks, size, model.isolation):
                    everyone, mine = int(blocks.keep[index].sum()), blocks.select(index[rank::ranks])
                    if len(mine):
                        out, wanted, source = run_model(model, mine)
                        share = -(-left // ranks)
                        for name, x in out.items():
                            parts[name].append(x.index_select(0, wanted[:share].to(x.device)).cpu())
                        provenance.append(source[:share])
                    bar.update(min(left, everyone))
                    left -= everyone
                    if left <= 0:
                        break
        return {name: torch.cat(tensors) for name, tensors in parts.items()}, torch.cat(provenance)


class RowsLoader:
    """Batches of rows that are computed when they are first asked for; every pass begins anew.

    Args:
        rows: makes raw rows by hook point and their provenance.
        batch_size: rows a batch.
        finish: scales and casts a batch.
        seen: called with every batch and its provenance.
    """

    def __init__(
        self,
        rows: Callable[[], tuple[dict[str, Tensor], Tensor]],
        batch_size: int,
        finish: Callable[[dict[str, Tensor]], Tensor | dict[str, Tensor]],
        seen: Callable[[Tensor | dict[str, Tensor], Tensor], None],
    ) -> None:
        self._rows, self._batch_size, self._finish, self._seen = rows, batch_size, finish, seen
        self._length: int | None = None

    def __len__(self) -> int:
        if self._length is None:  # after an exception Lightning asks again, when the rows are gone
            self._length = max(gather(-(-len(self._rows()[1]) // self._batch_size)))
        return self._length

    def __iter__(self) -> Iterator[Tensor | dict[str, Tensor]]:
        length = len(self)  # the same on all ranks: some strategies talk at every batch
        rows, provenance = self._rows()
        size = (
            self._batch_size
            if len(provenance) > (length - 1) * self._batch_size
            else -(-len(provenance) // max(1, length))
        )
        for number in range(length):
            part = slice(number * size, (number + 1) * size)
            batch = self._finish({name: x[part] for name, x in rows.items()})
            self._seen(batch, provenance[part])
            yield batch
