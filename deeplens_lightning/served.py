"""What a source of batches serves: live streams and shards alike.

A stream is any object with `batches(position, skip) -> Iterator[Served]`: `position` is one that an
earlier `Served` carried (`None` is the very beginning), and `batches(position, skip=served.step)`
yields what followed that `Served`, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

PROVENANCE = ("document_hash", "document_index", "position", "token_id")
"""The columns of a provenance tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One batch, with where its rows came from and how to get back here.

    Attributes:
        rows: `(batch, d_in)` by canonical hook name, raw (unscaled), in the activation dtype.
        provenance: int64 `(batch, 4)`: 64-bit document hash, document index, position in the
            document, token id; -1 where unknown.
        certain: batches that are certain to follow in this epoch, this one included.
        certain_rows: rows in those batches: only the last of an epoch may be short.
        position: JSON-like place in the source from which this batch can be computed again.
        step: batches served since `position`, this one included.
    """

    rows: dict[str, Tensor]
    provenance: Tensor
    certain: int
    certain_rows: int
    position: dict[str, Any]
    step: int


class Stream(Protocol):
    """Where one rank's batches come from."""

    def start(self, epoch: int) -> dict[str, Any]:
        """The position at which an epoch begins."""
        ...

    def batches(self, position: dict[str, Any] | None, skip: int) -> Iterator[Served]:
        """Batches after the first `skip` ones that follow `position`, to the end of the epoch."""
        ...

    def rescaled(self, table: Sequence[tuple[dict[str, Any], int, int]]) -> tuple[dict[str, Any], int]:
        """Go on with another number of ranks.

        Args:
            table: of every old rank: a position, and the batches and rows served since.

        Returns:
            A position for every new rank, and how many rows are served again.
        """
        ...

    def dropped(self, position: dict[str, Any], epoch_batches: int) -> int:
        """Rows of this epoch that this rank has beyond its first `epoch_batches` batches."""
        ...

    def close(self) -> None:
        """Let go of memory, files and threads."""
        ...
