"""What is handed from room to room: batches and their provenance, places in the data, ranks and devices.

Plain data. Nothing here imports another module of the package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from typing_extensions import Self

STATE_VERSION = 1
"""Version of every state below and of the data module's part of a checkpoint."""

PROVENANCE = ("document_hash", "document_index", "position", "token_id")
"""The columns of a provenance tensor."""

Batch: TypeAlias = Tensor | dict[str, Tensor]
"""Rows as the SAE sees them: `(batch, d_in)`, or by canonical name for several hook points."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where the rows of a batch came from: int64 `(batch,)` each, -1 where unknown.

    Attributes:
        document_hash: 64-bit hash of the document's text.
        document_index: the document's number in its source.
        position: the token's position in the document.
        token_id: the token.
    """

    document_hash: Tensor
    document_index: Tensor
    position: Tensor
    token_id: Tensor

    def stacked(self) -> Tensor:
        """int64 `(batch, 4)`, columns in the order of `PROVENANCE`."""
        return torch.stack([self.document_hash, self.document_index, self.position, self.token_id], 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Rank, world size and devices of this process.

    Attributes:
        rank: of this process among the data-parallel ranks, from 0.
        ranks: number of data-parallel ranks.
        device: where a model that is loaded here goes, with an index unless it is the CPU or MPS.
        batch_device: where the buffer and the batches are, likewise.
        progress: whether this process shows progress bars.
    """

    rank: int
    ranks: int
    device: torch.device
    batch_device: torch.device
    progress: bool


def device_of(name: str | torch.device) -> torch.device:
    """A device by name, with its index: "auto" is CUDA, else MPS, else the CPU; "cuda" is the current one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


@dataclass(frozen=True, kw_only=True)
class Place:
    """Base of all places: a frozen dataclass of numbers, strings and other places."""

    def to_state(self) -> dict[str, Any]:
        """The fields as JSON-like values; `from_state` is the inverse."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The inverse of `to_state`."""
        return cls(**state)


def _plain(value: Any) -> Any:
    return value.to_state() if isinstance(value, Place) else value


@dataclass(frozen=True, kw_only=True)
class DealingState(Place):
    """Which rank gets which document, up to some place in the text; see `text.documents.Dealing`.

    Attributes:
        ranks: number of ranks that documents are dealt to.
        by_shards: whole parts of the dataset go round the ranks.
        loads: characters dealt to each rank so far.
        frontiers: part, number and segment of the first document that each rank had not finished; empty while
            documents are dealt to the present ranks.
        earlier: the dealing before the number of ranks changed.
    """

    ranks: int
    by_shards: bool
    loads: tuple[int, ...]
    frontiers: tuple[tuple[int, int, int], ...] = ()
    earlier: DealingState | None = None

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The inverse of `to_state`."""
        return cls(
            ranks=state["ranks"],
            by_shards=state["by_shards"],
            loads=tuple(state["loads"]),
            frontiers=tuple((part, number, segment) for part, number, segment in state["frontiers"]),
            earlier=cls.from_state(state["earlier"]) if state["earlier"] else None,
        )


@dataclass(frozen=True, kw_only=True)
class TextPosition(Place):
    """A place in the text: a document of the epoch's order, and a segment of it.

    Attributes:
        at: part of the dataset, counted in the epoch's order, and the number of documents of it before this one.
        reader: a state from which the dataset can be read again and the place that this is, `(state, at)`; None
            where it is read from the start of the part.
        dealing: which rank got what before this document.
        segment: the first segment of the document that counts.
    """

    at: tuple[int, int]
    reader: tuple[Any, tuple[int, int]] | None
    dealing: DealingState
    segment: int = 0

    def to_state(self) -> dict[str, Any]:
        """The fields as JSON-like values; `from_state` is the inverse."""
        document = {"at": self.at, "state": self.reader, "dealing": self.dealing.to_state()}
        return {"document": document, "segment": self.segment}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The inverse of `to_state`."""
        document = state["document"]
        return cls(
            at=_pair(document["at"]),
            reader=(document["state"][0], _pair(document["state"][1])) if document["state"] else None,
            dealing=DealingState.from_state(document["dealing"]),
            segment=state["segment"],
        )


@dataclass(frozen=True, kw_only=True)
class BlockPosition(Place):
    """A place among the shuffled blocks: a window of the pool, and what was taken of it.

    Attributes:
        start: where the window's first segment comes from; None is the start of the epoch.
        kept: rows of the epoch in the blocks before the window.
        window: number of the window.
        skip: groups of blocks of the window that were taken.
        since: rows served from the documents at and after `start`.
    """

    start: TextPosition | None = None
    kept: int = 0
    window: int = 0
    skip: int = 0
    since: int = 0

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The inverse of `to_state`."""
        start = TextPosition.from_state(state["start"]) if state["start"] else None
        return cls(**{**state, "start": start})


@dataclass(frozen=True, kw_only=True)
class RowPosition(Place):
    """A place among the model's rows: a model batch of a group of blocks, and a row of it.

    Attributes:
        blocks: the group of blocks.
        batch: number of the model batch in the group.
        row: rows of the model batch before the place.
        outliers: rows of the epoch dropped for their norm before the model batch.
        made: rows of the epoch before the model batch.
    """

    blocks: BlockPosition
    batch: int = 0
    row: int = 0
    outliers: int = 0
    made: int = 0

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The inverse of `to_state`."""
        return cls(**{**state, "blocks": BlockPosition.from_state(state["blocks"])})


@dataclass(frozen=True, kw_only=True)
class LivePosition(Place):
    """A place in a live stream: a window of the buffer of rows.

    Attributes:
        epoch: number of the data epoch.
        window: number of the window.
        rows: where the window's first row comes from; None is the start of the epoch.
    """

    epoch: int
    window: int = 0
    rows: RowPosition | None = None

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The inverse of `to_state`; the start of an epoch may be its number alone."""
        rows = state.get("rows")
        return cls(**{**state, "rows": RowPosition.from_state(rows) if rows else None})


@dataclass(frozen=True, kw_only=True)
class ShardPosition(Place):
    """A place in a cache: how many rows of an epoch's order were served, and how the rest is ordered and dealt.

    Attributes:
        epoch: number of the data epoch.
        start: rows of the epoch, of all ranks, before the place.
        world_size: number of ranks that take turns.
        batch_size: rows a batch of each rank.
        shuffle: kind of order: "global", "window" or "none".
        window_bytes: size of a window of shards.
    """

    epoch: int
    start: int
    world_size: int
    batch_size: int
    shuffle: str
    window_bytes: int


StreamPosition: TypeAlias = LivePosition | ShardPosition
"""A place in a stream: what `Served` carries and a checkpoint keeps."""


def stream_position(state: Mapping[str, Any]) -> StreamPosition:
    """The position of either kind whose `to_state` this is."""
    return ShardPosition.from_state(state) if "shuffle" in state else LivePosition.from_state(state)


def _pair(values: Sequence[int]) -> tuple[int, int]:
    first, second = values
    return first, second


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One batch, with where its rows came from and how to get back here.

    Attributes:
        rows: `(batch, d_in)` by canonical hook name, raw (unscaled), in the activation dtype.
        provenance: int64 `(batch, 4)`, columns as in `PROVENANCE`; -1 where unknown.
        certain: batches that are certain to follow in this epoch, this one included.
        certain_rows: rows in those batches: only the last of an epoch may be short.
        position: a place in the source from which this batch can be computed again.
        step: batches served since `position`, this one included.
    """

    rows: dict[str, Tensor]
    provenance: Tensor
    certain: int
    certain_rows: int
    position: StreamPosition
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankProgress:
    """How far one rank has come.

    Attributes:
        position: a position of its stream.
        step: batches served since.
        rows: rows in those batches.
    """

    position: StreamPosition
    step: int
    rows: int


class Stream(Protocol):
    """Batches of one rank, live or from a cache.

    `batches(position, step)` yields what followed the `Served` that carried this position and step, bit for bit.
    """

    @property
    def buffer_rows(self) -> int | None:
        """Rows being mixed; None where there is no buffer."""
        ...

    @property
    def counts(self) -> Mapping[str, int]:
        """What was read and dropped in this epoch, by name; empty where nothing is counted."""
        ...

    def start(self, epoch: int) -> StreamPosition:
        """The position at which an epoch begins."""
        ...

    def batches(self, position: StreamPosition, skip: int) -> Iterator[Served]:
        """Batches after the first `skip` ones that follow `position`, to the end of the epoch."""
        ...

    def rescaled(self, table: Sequence[RankProgress]) -> tuple[StreamPosition, int]:
        """Continue with another number of ranks.

        Args:
            table: the progress of every old rank.

        Returns:
            A position for every new rank, and the number of rows that are served again.
        """
        ...

    def dropped(self, position: StreamPosition, epoch_batches: int) -> int:
        """Rows of this epoch that this rank has beyond its first `epoch_batches` batches."""
        ...

    def row_age(self, position: StreamPosition, step: int) -> float | None:
        """Rows served between the computing of a row and its batch, on average; None where none is computed."""
        ...

    def sync(self) -> None:
        """Make what was written so far durable: a checkpoint is about to say that it was served."""
        ...

    def close(self) -> None:
        """Free memory, files and threads."""
        ...
