"""Gather rows from memory-mapped shards, in the order in which they are stored.

In: numbers of rows of a split. Out: these rows, and a function that gathers their provenance.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from deeplens_lightning.devices import empty_rows
from deeplens_lightning.shards.catalog import Catalog, Shard
from deeplens_lightning.shards.changes import OpenFiles
from deeplens_lightning.shards.errors import DamagedShardError, ShardError
from deeplens_lightning.shards.folder import LocalFolder
from deeplens_lightning.shards.format import DTYPES, Rows
from deeplens_lightning.shards.in_memory import open_in_memory
from deeplens_lightning.shards.joined import JoinedShards
from deeplens_lightning.shards.local_copies import LocalCopies, local_path
from deeplens_lightning.shards.opening import check_finite_bare, check_sum, open_listed
from deeplens_lightning.shards.rowset import Integers, RowSet
from deeplens_lightning.shards.tensors import OpenShard
from deeplens_lightning.types import PROVENANCE, Origins

PIECES = 8
"""Number of pieces that a shuffled batch is divided into; each piece is a random sample in ascending order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """Where some rows are stored, in the order in which they are gathered.

    Attributes:
        shards: number of the shard of each row, int64 `(n,)`.
        rows: number of each row within its shard, int64 `(n,)`.
        touched: numbers of these shards, each one once.
    """

    shards: Integers
    rows: Integers
    touched: list[int]


class Gatherer:
    """Gather rows of a split by number.

    Args:
        catalog: the shards.
        hook_points: `Rows` by canonical hook name, of the hook points to gather.
        rows: the rows of the split; a catalog's rows are numbered from 0 through all of its shards.
        copies: local copies of remote shards.
        bare_hook: hook name for bare tensors.
        checksums: compare every local shard with its checksum when it is first opened.
        pin_memory: return rows and provenance in pinned memory, which a CUDA device reads asynchronously.
    """

    def __init__(
        self,
        catalog: Catalog,
        hook_points: Mapping[str, Rows],
        rows: RowSet,
        copies: LocalCopies,
        bare_hook: str | None,
        checksums: bool,
        pin_memory: bool = False,
    ) -> None:
        self._catalog, self._hook_points, self._rows, self._copies = catalog, hook_points, rows, copies
        self._bare_hook, self._checksums, self._pin_memory = bare_hook, checksums, pin_memory
        self._has_bare = any(shard.storage == "bare" for shard in catalog.shards)
        self._starts = shard_starts(catalog.shards)
        self._firsts = rows.count_below(self._starts)
        self._open: dict[int, OpenShard] = {}
        self._files = OpenFiles()
        self._joined: JoinedShards | None = None
        self._checked: set[int] = set()
        self._near: list[int] = []

    def move_to(self, near: list[int]) -> None:
        """Start to read these shards ahead, and close all others; nothing if they are those of the last call.

        Args:
            near: numbers of the shards; empty if any shard may be read at any time.
        """
        if near == self._near:
            return
        self._near = near
        self._files.check()
        self._files.keep(near)
        self._open = {number: shard for number, shard in self._open.items() if number in near}
        self._joined = None
        for number in near:
            self._read_ahead(self._catalog.shards[number])

    def close(self) -> None:
        """Close all shards, except those whose provenance can still be asked for."""
        self._open.clear()
        self._files.keep([])
        self._joined = None

    def locate(self, ordinals: Integers) -> Located:
        """Find where some rows are stored.

        Rows of ascending numbers keep their order. Any other numbers are treated as a random sample: they are divided
        into `PIECES` pieces, and the rows of each piece are put in ascending order. Each piece is a random sample too.
        Reading in random order, or moving the rows a second time, would take twice the time. The result depends on the
        numbers alone, and not on the shards that the rows are stored in.

        Args:
            ordinals: numbers of rows within the split, int64 `(n,)`.
        """
        if (ordinals[1:] < ordinals[:-1]).any():
            ordinals = _each_sorted(ordinals, -(-len(ordinals) // PIECES))
        shards = np.searchsorted(self._firsts, ordinals, "right") - 1
        rows = self._rows[ordinals] - self._starts[shards]
        return Located(shards=shards, rows=rows, touched=np.flatnonzero(np.bincount(shards)).tolist())

    def take(self, located: Located) -> tuple[dict[str, Tensor], Origins]:
        """Gather some rows, and make a function that gathers their provenance.

        Args:
            located: `n` rows.

        Returns:
            Rows `(n, d_in)` in the activation dtype by hook name, and a function that returns their provenance, int64
            `(n, 4)`. The first call reads it, and may come at any time, also after `move_to` and `close`.

        Raises:
            DamagedShardError: a shard is missing or damaged, or was changed while it was open.
        """
        shards, places = located.shards, located.rows
        self._files.check_sometimes()
        joined = self._opened(located.touched)
        rows = {
            name: joined.take(name, shards, places, self._empty(len(places), kind.d_in, DTYPES[kind.dtype]))
            for name, kind in self._hook_points.items()
        }
        if self._has_bare:
            check_finite_bare(rows, shards, places, self._catalog.shards)
        source = joined.provenance

        @cache
        def provenance() -> Tensor:
            return source.take(shards, places, self._empty(len(places), len(PROVENANCE), torch.int64))

        return rows, provenance

    def _empty(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        if self._pin_memory:
            return torch.empty(rows, width, dtype=dtype, pin_memory=True)
        return empty_rows(rows, (width,), dtype)

    def _opened(self, numbers: Sequence[int]) -> JoinedShards:
        """Open these shards, and join all open ones."""
        missing = [number for number in numbers if number not in self._open]
        for number in missing:
            self._open[number] = self._mapped(number)
        if missing or self._joined is None:
            self._joined = JoinedShards(self._open, list(self._hook_points))
        return self._joined

    def _mapped(self, number: int) -> OpenShard:
        shard = self._catalog.shards[number]
        if shard.tensor is not None:
            [hook] = self._catalog.hook_points
            return open_in_memory(shard.tensor, hook)
        with local_path(shard.folder, shard.file, shard.nbytes, shard.sha256, self._copies) as path:
            self._files.note(number, path, shard.where, replaceable=not isinstance(shard.folder, LocalFolder))
            if self._checksums and number not in self._checked:
                check_sum(shard, path)
                self._checked.add(number)
            return open_listed(shard, path, self._catalog.hook_points, self._bare_hook)

    def _read_ahead(self, shard: Shard) -> None:
        if shard.tensor is not None:
            return
        if not isinstance(shard.folder, LocalFolder):
            self._copies.fetch(shard.folder, shard.file, shard.nbytes, shard.sha256)
        elif sys.platform == "linux":
            try:
                file = os.open(shard.folder.path / shard.file, os.O_RDONLY)
            except FileNotFoundError as error:
                raise DamagedShardError(f"{shard.where} is missing") from error
            try:
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(file)


def _each_sorted(ordinals: Integers, size: int) -> Integers:
    """Sort each piece of `size` ordinals, and the shorter rest."""
    narrow = np.int32 if ordinals.max() < 2**31 else np.int64  # sorting 32 bits takes a fifth of the time
    result = ordinals.astype(narrow)
    full = len(ordinals) // size * size
    result[:full].reshape(-1, size).sort(axis=1)
    result[full:].sort()
    return result.astype(np.int64)


def shard_starts(shards: Sequence[Shard]) -> Integers:
    """Number of each shard's first row, and the number of all rows: int64 `(shards + 1,)`."""
    return np.cumsum([0, *(shard.rows for shard in shards)])


def chosen_hook_points(catalog: Catalog, only: Sequence[str] | None) -> dict[str, Rows]:
    """`Rows` of some hook points of a catalog.

    Args:
        catalog: the catalog with the hook points.
        only: canonical names of the hook points to choose, in this order; None or empty for all.

    Returns:
        `Rows` by canonical hook name.

    Raises:
        ShardError: the catalog has no hook point of a given name.
    """
    missing = [name for name in only or () if name not in catalog.hook_points]
    if missing:
        raise ShardError(
            f"the shards hold {', '.join(catalog.hook_points)}, not {', '.join(missing)}: choose among "
            "those, or write the others into another folder"
        )
    return {name: catalog.hook_points[name] for name in only or catalog.hook_points}
