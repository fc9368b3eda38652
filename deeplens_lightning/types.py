"""Data types that the folders of the package share: batches, provenance, positions in the data, ranks and devices.

Plain data. Positions are read from checkpoints and sidecars, so every number in them has a range.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol, TypeAlias

import torch
from torch import Tensor
from typing_extensions import Self

from deeplens_lightning.disk.records import Count, Positive, read_record, to_plain

STATE_VERSION = 2
"""Version of the states below (`to_state`) and of the data module's part of a checkpoint."""
SHARD_ORDER: Final = 2
"""Version of the order in which a cache is read: 1 depended on the number of its shards, 2 does not."""

PROVENANCE = ("document_hash", "document_index", "position", "token_id")
"""The columns of a provenance tensor, int64 `(batch, 4)`."""

Origins: TypeAlias = Callable[[], Tensor]
"""A function that returns the provenance of a batch, the same tensor each time; it may read it from disk at first."""

Batch: TypeAlias = Tensor | dict[str, Tensor]
"""Rows as the SAE gets them: `(batch, d_in)`, or for several hook points a dict of such tensors by canonical name."""


def key_of(batch: Batch) -> Tensor:
    """The tensor that identifies a batch: the batch itself, or the first value of a dict."""
    return batch if isinstance(batch, Tensor) else next(iter(batch.values()))


@dataclass(frozen=True, slots=True)
class Provenance:
    """The document, position and token of each row of a batch: int64 `(batch,)` each, -1 where unknown.

    Attributes:
        document_hash: 64-bit hash of the document's text.
        document_index: index of the document in its dataset.
        position: position of the token in the document.
        token_id: id of the token.
    """

    document_hash: Tensor
    document_index: Tensor
    position: Tensor
    token_id: Tensor

    def stacked(self) -> Tensor:
        """Stack the fields into one tensor, int64 `(batch, 4)`, columns in the order of `PROVENANCE`."""
        return torch.stack([self.document_hash, self.document_index, self.position, self.token_id], 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Rank, world size and devices of this process.

    Attributes:
        rank: number of this process among the data-parallel ranks, from 0.
        ranks: number of data-parallel ranks.
        device: device that the language model is loaded to; a CUDA device has an index.
        batch_device: device of the buffer and the batches; a CUDA device has an index.
        progress: whether this process shows progress bars.
        group: process group of the data-parallel ranks; None for the group of all processes.
    """

    rank: int
    ranks: int
    device: torch.device
    batch_device: torch.device
    progress: bool
    group: torch.distributed.ProcessGroup | None = None


@dataclass(frozen=True, kw_only=True)
class Place:
    """Base class of all positions in the data: a frozen dataclass of numbers, strings and other positions."""

    def to_state(self) -> dict[str, Any]:
        """Convert to JSON-like values, for a checkpoint; `from_state` is the inverse."""
        state: dict[str, Any] = to_plain(self)
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Restore from JSON-like values: the inverse of `to_state`.

        Raises:
            RecordError: a field is missing, unknown, of another type or out of range.
        """
        return read_record(cls, state)


@dataclass(frozen=True, kw_only=True)
class DealingState(Place):
    """How documents were assigned to ranks up to a position in the text: the frozen state of `text.dealing.Dealing`.

    Attributes:
        ranks: number of ranks that documents are assigned to.
        by_shards: whether part `n` of the dataset goes to rank `n % ranks` as a whole.
        loads: number of characters assigned to each rank so far.
        frontiers: part, number and segment of the first document that each rank had not finished when the number
            of ranks changed; empty if this state has the present number of ranks.
        earlier: the state before the number of ranks changed.
    """

    ranks: Positive
    by_shards: bool
    loads: tuple[Count, ...]
    frontiers: tuple[tuple[Count, Count, Count], ...] = ()
    earlier: DealingState | None = None

    def __post_init__(self) -> None:
        if len(self.loads) != self.ranks or len(self.frontiers) not in (0, self.ranks):
            raise ValueError(
                f"there are {len(self.loads)} loads and {len(self.frontiers)} frontiers of {self.ranks} ranks"
            )
        if self.earlier is not None and not self.earlier.frontiers:
            raise ValueError("the assignment to an earlier number of ranks has no frontiers")


@dataclass(frozen=True, kw_only=True)
class TextPosition(Place):
    """A position in the text: a document in the epoch's order, and a segment in the document.

    Attributes:
        at: number of the part of the dataset in the epoch's order, and number of the document in that part.
        reader: a state of the dataset to start reading from, and the `at` which that state belongs to; None to read
            from the start of the part.
        dealing: how documents before this one were assigned to ranks.
        segment: number of the first segment of the document that is read.
    """

    at: tuple[Count, Count]
    reader: tuple[Any, tuple[Count, Count]] | None
    dealing: DealingState
    segment: Count = 0


@dataclass(frozen=True, kw_only=True)
class BlockPosition(Place):
    """A position in the stream of shuffled blocks: a window of the block shuffle, and a number of groups in it.

    Attributes:
        start: position in the text of the window's first segment; None for the start of the epoch.
        kept: number of rows of the epoch in the blocks before the window.
        window: number of the window.
        skip: number of groups of blocks of the window that were already taken.
        since: number of rows already produced from the documents at and after `start`.
    """

    start: TextPosition | None = None
    kept: Count = 0
    window: Count = 0
    skip: Count = 0
    since: Count = 0


@dataclass(frozen=True, kw_only=True)
class RowPosition(Place):
    """A position in the stream of rows that the model computes: a model batch in a group of blocks, and a row in it.

    Attributes:
        blocks: position of the group of blocks.
        batch: number of the model batch in the group.
        row: number of the row in the model batch.
        outliers: number of rows of the epoch that were dropped for their norm before this model batch.
        made: number of rows of the epoch before this model batch.
    """

    blocks: BlockPosition
    batch: Count = 0
    row: Count = 0
    outliers: Count = 0
    made: Count = 0


@dataclass(frozen=True, kw_only=True)
class LivePosition(Place):
    """A position in a live stream: the start of a window of the row shuffle.

    Attributes:
        epoch: number of the data epoch.
        window: number of the window.
        rows: position of the window's first row; None for the start of the epoch.
    """

    epoch: Count
    window: Count = 0
    rows: RowPosition | None = None

    def __post_init__(self) -> None:
        if self.rows is None and self.window:
            raise ValueError(f"the first row of window {self.window} is not known")


@dataclass(frozen=True, kw_only=True)
class ShardPosition(Place):
    """A position in a cache: a row in the epoch's order, and the settings that determine that order.

    Attributes:
        epoch: number of the data epoch.
        start: number of rows of the epoch before this position, the sum over all ranks.
        world_size: number of ranks; batches of the epoch's order go to them in turn.
        batch_size: rows per batch of each rank.
        shuffle: kind of order.
        window_bytes: size of a window in bytes.
        order: version of the order; positions of version 1 do not hold it.
        stretch_rows: number of consecutive rows that stay together in a window; None in version 1 of the order.
    """

    epoch: Count
    start: Count
    world_size: Positive
    batch_size: Positive
    shuffle: Literal["global", "window", "none"]
    window_bytes: Positive
    order: Literal[1, 2] = 1
    stretch_rows: Positive | None = None

    def __post_init__(self) -> None:
        if (self.order == 1) != (self.stretch_rows is None):
            raise ValueError(f"order {self.order} does not go with stretch_rows={self.stretch_rows}")


StreamPosition: TypeAlias = LivePosition | ShardPosition
"""A position in a stream of batches: a field of `Served`, saved in checkpoints."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One batch of a stream, its provenance, and the position to compute it again from.

    Attributes:
        rows: `(batch, d_in)` by canonical hook name, raw (unscaled), in the activation dtype.
        origins: returns `provenance`; it may be called at any time, also after the stream is closed.
        certain: number of batches guaranteed to come in this epoch, this one included.
        certain_rows: number of rows in those batches; only the last batch of an epoch may be short.
        position: the position from which the stream can compute this batch again.
        step: number of batches since `position`, this one included.
    """

    rows: dict[str, Tensor]
    origins: Origins
    certain: int
    certain_rows: int
    position: StreamPosition
    step: int

    @property
    def provenance(self) -> Tensor:
        """int64 `(batch, 4)`, columns as in `PROVENANCE`; -1 where unknown."""
        return self.origins()


@dataclass(frozen=True, slots=True, kw_only=True)
class RankProgress:
    """How far one rank has come in its stream.

    Attributes:
        position: a position in its stream.
        step: number of batches served since `position`.
        rows: number of rows in those batches.
    """

    position: StreamPosition
    step: Count
    rows: Count


class Stream(Protocol):
    """The protocol of a stream of batches for one rank, computed live or read from a cache.

    For a `Served` with a position and a step, `batches(position, step)` yields the batches after it, bit for bit.
    """

    @property
    def buffer_rows(self) -> int | None:
        """Number of slots of the shuffle buffer; None if there is no buffer."""

    @property
    def counts(self) -> Mapping[str, int]:
        """Numbers of documents, tokens and rows read or dropped in this epoch, by name; empty if not counted."""

    def start(self, epoch: int) -> StreamPosition:
        """The position of the first batch of an epoch."""

    def batches(self, position: StreamPosition, skip: int) -> Iterator[Served]:
        """Iterate over the batches from `position` to the end of the epoch, without the first `skip` ones."""

    def checked(self, position: StreamPosition, step: int, *, anyway: bool = False) -> StreamPosition:
        """Check that a position lies in the data and that the batches after it can be served again.

        Args:
            position: a position of any number of ranks.
            step: number of batches already served from there.
            anyway: accept a position whose order has changed since.

        Returns:
            The position, in the present version of the order.

        Raises:
            ValueError: it does not.
        """

    def rescaled(self, table: Sequence[RankProgress]) -> tuple[StreamPosition, int]:
        """Find where to continue with another number of ranks.

        Args:
            table: the progress of every rank that was training before.

        Returns:
            A position, the same for every present rank, and the number of rows that will be served a second time.
        """

    def dropped(self, position: StreamPosition, epoch_batches: int) -> int:
        """Number of rows of this epoch that this rank has after its first `epoch_batches` batches."""

    def row_age(self, position: StreamPosition, step: int) -> float | None:
        """Mean number of rows served between computing a row and serving it; None if rows are read from a cache."""

    def sync(self) -> None:
        """Flush written rows to disk; called before a checkpoint that counts these rows as served is saved."""

    def close(self) -> None:
        """Free memory, files and threads."""
