"""The data module's part of a checkpoint: write it, read it, and check whether a run can continue from it.

It contains only numbers, strings, lists, dicts and tensors, so that it loads with `weights_only=True`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from sys import float_info
from typing import Annotated, Any

import torch
from torch import Tensor

from deeplens_lightning.disk.json_text import DIGEST, check_digest, digest_of
from deeplens_lightning.disk.records import (
    Count,
    Positive,
    RecordError,
    Within,
    read_record,
    to_plain,
)
from deeplens_lightning.normalization import Scaling, scalings_state
from deeplens_lightning.permutation import MAX_LENGTH
from deeplens_lightning.shards.format import ADDED_ENTRIES
from deeplens_lightning.stream.earlier_states import from_version_1
from deeplens_lightning.stream.measured_statistics import Statistics
from deeplens_lightning.types import STATE_VERSION, LivePosition, RankProgress, ShardPosition

DEPTH = 200
"""Largest depth of nested values in a state: it has 10 levels, and 1 more for each change of the number of ranks."""


@dataclass(frozen=True, kw_only=True)
class LoaderPosition:
    """How far training has come in the data; the same object on every rank.

    Now and then the ranks agree on a number of batches that each of them can serve (`ActivationLoader`).

    Attributes:
        ranks: for every rank, a position in its stream, the number of batches from there to the last agreement, and
            the number of rows in the batches that the rank could guarantee at that agreement.
        since: number of batches trained on since that agreement.
        batch_size: rows per batch of each rank.
        epoch_batches: number of batches of the data epoch trained on.
        in_epoch: number of batches of the Trainer's epoch trained on.
        rows_dropped: number of rows that earlier epochs could not serve, the sum over all ranks.
    """

    ranks: tuple[RankProgress, ...]
    since: Count
    batch_size: Positive
    epoch_batches: Count
    in_epoch: Count
    rows_dropped: Count

    def __post_init__(self) -> None:
        if not self.ranks:
            raise ValueError("there are no ranks")
        if len({(type(rank.position), rank.position.epoch) for rank in self.ranks}) > 1:
            raise ValueError("the ranks are in different epochs or kinds of streams")
        fewest = min(-(-rank.rows // self.batch_size) for rank in self.ranks)
        if not self.since <= min(fewest, self.epoch_batches):
            raise ValueError(
                f"{self.since} batches since the last agreement are more than the {fewest} agreed on, or than the "
                f"{self.epoch_batches} of the epoch"
            )
        # Not `window_bytes`, which depends on the memory of each rank's machine.
        starts = {
            (position.start, position.shuffle, position.order, position.stretch_rows)
            for position in (rank.position for rank in self.ranks)
            if isinstance(position, ShardPosition)
        }
        if len(starts) > 1:
            raise ValueError("the ranks have different positions in a cache")
        for rank in self.ranks:
            self._check_rank(rank)

    def _check_rank(self, rank: RankProgress) -> None:
        position, ranks = rank.position, len(self.ranks)
        if isinstance(position, ShardPosition):
            if (position.world_size, position.batch_size) != (ranks, self.batch_size):
                raise ValueError(
                    f"a position of {position.world_size} ranks with batches of {position.batch_size} rows does not go "
                    f"with {ranks} ranks and batches of {self.batch_size} rows"
                )
            return
        start = position.rows.blocks.start if position.rows else None
        if start is not None and start.dealing.ranks != ranks:
            raise ValueError(f"documents were assigned to {start.dealing.ranks} ranks, and there are {ranks}")

    def table(self) -> list[RankProgress]:
        """The progress of each rank at the time of the checkpoint."""
        return [
            replace(
                rank,
                step=rank.step + self.since,
                rows=rank.step * self.batch_size + min(self.since * self.batch_size, rank.rows),
            )
            for rank in self.ranks
        ]


@dataclass(frozen=True, kw_only=True)
class _Numbers:
    """The part of a state that holds no tensors; the fields are those of `DataState`."""

    fingerprint: Mapping[str, str]
    position: LoaderPosition | None
    buffer_rows: Annotated[int, Within(1, MAX_LENGTH)] | None
    max_norms: Mapping[str, Annotated[float, Within(float_info.min, float_info.max)]]


@dataclass(frozen=True, kw_only=True)
class DataState:
    """Everything that a checkpoint stores for a data module.

    Attributes:
        fingerprint: what must be the same when the run continues: name to value.
        position: how far training has come; None before the first batch.
        buffer_rows: number of slots of the shuffle buffer; None without a buffer.
        statistics: normalisation and norm limits; None if they were not measured.
    """

    fingerprint: Mapping[str, str]
    position: LoaderPosition | None
    buffer_rows: int | None
    statistics: Statistics | None

    def __post_init__(self) -> None:
        position, rows = self.position, self.buffer_rows
        blocks = self.fingerprint.get("inference_batch_size", "1")
        if not re.fullmatch("[1-9][0-9]{0,5}", blocks):
            raise ValueError(f"inference_batch_size is {blocks!r}")
        if position is None:
            return
        if rows is None and isinstance(position.ranks[0].position, LivePosition):
            raise ValueError("buffer_rows is missing, and the position is that of a live stream")
        if rows is not None and rows % position.batch_size:
            raise ValueError(
                f"buffer_rows is {rows}, expected a multiple of batch_size={position.batch_size}"
            )

    def to_state(self) -> dict[str, Any]:
        """Convert to JSON-like values and tensors, with a digest of them, for a checkpoint."""
        measured = self.statistics
        state = {
            "version": STATE_VERSION,
            "fingerprint": dict(self.fingerprint),
            "position": to_plain(self.position),
            "buffer_rows": self.buffer_rows,
            "scalings": scalings_state(measured.scalings) if measured else {},
            "max_norms": dict(measured.max_norms) if measured else {},
        }
        return {**state, DIGEST: digest_of(_without_tensors(state))}

    @classmethod
    def from_state(cls, state: object) -> DataState:
        """The inverse of `to_state`; also reads states of version 1, which have no digest.

        Args:
            state: what a checkpoint holds.

        Raises:
            ValueError: the state is damaged, or of a newer version of the format.
        """
        if not isinstance(state, Mapping):
            raise _damaged(f"it is a {type(state).__name__}")
        version = state.get("version")
        if type(version) is int and version > STATE_VERSION:
            raise ValueError(
                f"the checkpoint's data state has version {version}, this release reads up to version {STATE_VERSION}: "
                "pip install --upgrade deeplens-lightning, or load only the SAE with "
                "SparseAutoencoder.load_from_checkpoint and start a new run"
            )
        try:
            content = _checked(state, version)
            scalings = content.pop("scalings", None)
            numbers = read_record(_Numbers, content)
            return cls(
                fingerprint=numbers.fingerprint,
                position=numbers.position,
                buffer_rows=numbers.buffer_rows,
                statistics=_statistics(scalings, dict(numbers.max_norms)),
            )
        except ValueError as error:
            raise _damaged(str(error)) from error

    def check_widths(self, widths: Mapping[str, int]) -> None:
        """Check that the normalisation is that of some hook points.

        Args:
            widths: width of the rows by canonical hook name.

        Raises:
            ValueError: it is of other hook points or widths.
        """
        if self.statistics is None:
            return
        there = {name: len(scaling.scale) for name, scaling in self.statistics.scalings.items()}
        if there != dict(widths):
            raise _damaged(f"its normalisation is of rows {there}, and this run has rows {dict(widths)}")


def _checked(state: Mapping[Any, Any], version: object) -> dict[str, Any]:
    """The content of a state without version and digest, in the present version; checks the digest.

    Raises:
        RecordError: the digest is missing or wrong, or there is no such version.
    """
    plain = _without_tensors(state)
    content = {key: value for key, value in state.items() if key not in ("version", DIGEST)}
    if type(version) is not int or version not in (1, STATE_VERSION):
        raise RecordError(f"its version is {version!r}")
    if version == STATE_VERSION:
        check_digest(plain)
        return content
    if DIGEST in state:
        raise RecordError("it has a digest, which states of version 1 do not have")
    former: dict[str, Any] = from_version_1(content)
    return former


def _without_tensors(value: Any, depth: int = 0) -> Any:
    """JSON values that stand for a state: for a tensor its dtype, shape and checksum.

    Raises:
        RecordError: the state holds other values, or is nested too deeply.
    """
    if depth > DEPTH:
        raise RecordError("it is nested too deeply")
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.nbytes > value.untyped_storage().nbytes():
            raise RecordError("it holds a tensor that is sparse or larger than its memory")
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return [str(value.dtype), list(value.shape), sha256(data.tobytes()).hexdigest()]
    if isinstance(value, Mapping):
        return {_key(key): _without_tensors(item, depth + 1) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_without_tensors(item, depth + 1) for item in value]
    if not isinstance(value, bool | int | float | str | None):
        raise RecordError(f"it holds a {type(value).__name__}")
    return value


def _key(key: Any) -> str:
    if not isinstance(key, str | int):
        raise RecordError(f"it holds the key {key!r}")
    return key if isinstance(key, str) else f"{key!r}:"


def _statistics(scalings: object, max_norms: dict[str, float]) -> Statistics | None:
    """The statistics of a state; None if they were not measured.

    Raises:
        ValueError: they are damaged.
    """
    if not isinstance(scalings, Mapping):
        raise RecordError(f"scalings is {scalings!r}, expected an object")
    found = {name: Scaling.from_state_dict(scaling) for name, scaling in scalings.items()}
    if max_norms and max_norms.keys() != found.keys():
        raise RecordError(f"there are norm limits of {list(max_norms)} and normalisations of {list(found)}")
    return Statistics(scalings=found, max_norms=max_norms) if found else None


def _damaged(reason: str) -> ValueError:
    return ValueError(
        f"the checkpoint's data state cannot be used: {reason}. Resume from another checkpoint, such as the one before; "
        "or load only the SAE with SparseAutoencoder.load_from_checkpoint and start a new run"
    )


def differences(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """List the names whose values differ, each as a line of text; a missing one of `ADDED_ENTRIES` does not differ."""
    return [
        f"{key}: {saved.get(key, '(nothing)')} in the checkpoint, {now.get(key, '(nothing)')} now"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key) and (key in saved or key not in ADDED_ENTRIES)
    ]


def check_fingerprint(saved: Mapping[str, str], now: Mapping[str, str], unused: Collection[str] = ()) -> None:
    """Check that a run has the same data as a checkpoint.

    Args:
        saved: fingerprint in the checkpoint.
        now: fingerprint of this run.
        unused: names that may differ.

    Raises:
        ValueError: the fingerprints differ; the message lists every difference.
    """
    found = differences(
        *({key: value for key, value in each.items() if key not in unused} for each in (saved, now))
    )
    if found:
        raise ValueError(
            "this checkpoint was taken on other data, so the run cannot be resumed exactly:\n  "
            + "\n  ".join(found)
            + "\nUse the configuration of the checkpoint, or give resume_anyway=True to continue at the same position "
            "in the new data"
        )
