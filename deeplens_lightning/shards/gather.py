"""Taking rows out of shards: mapped files, sorted reads, one copy into place.

In: row numbers, in any order. Out: their rows and provenance in that order.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deeplens_lightning.shards.catalog import Catalog, Shard, local_path
from deeplens_lightning.shards.errors import DamagedShardError, ShardError
from deeplens_lightning.shards.folder import LocalFolder
from deeplens_lightning.shards.format import DTYPES, Rows
from deeplens_lightning.shards.remote import LocalCopies
from deeplens_lightning.shards.save import sha256_of
from deeplens_lightning.shards.tensors import OpenShard, open_bare, open_shard


class Gatherer:
    """Rows of a catalog, by number.

    Args:
        catalog: what there is; rows are numbered through its shards.
        hook_points: which of its hook points to take.
        copies: of remote shards.
        bare_hook: hook name for bare tensors.
        checksums: check every local shard when it is first opened.
    """

    def __init__(
        self,
        catalog: Catalog,
        hook_points: Mapping[str, Rows],
        copies: LocalCopies,
        bare_hook: str | None,
        checksums: bool,
    ) -> None:
        self._catalog, self._hook_points, self._copies = catalog, hook_points, copies
        self._bare_hook, self._checksums = bare_hook, checksums
        self._starts = shard_starts(catalog.shards)
        self._open: dict[int, OpenShard] = {}
        self._checked: set[int] = set()

    def move_to(self, near: Sequence[int]) -> None:
        """Have these shards at hand or on their way, and let go of all others."""
        self._open = {number: shard for number, shard in self._open.items() if number in near}
        for number in near:
            self._read_ahead(self._catalog.shards[number])

    def close(self) -> None:
        """Let go of all shards."""
        self._open.clear()

    def take(self, index: NDArray[np.int64], staging: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """The rows numbered `index` `(n,)` and their provenance, in that order.

        `staging` is a dictionary of the caller's own, for room that is used again and again.
        """
        back = None
        if (index[1:] < index[:-1]).any():
            by_place = np.argsort(index)
            index = index[by_place]
            back = torch.empty(len(index), dtype=torch.int64)
            back[torch.from_numpy(by_place)] = torch.arange(len(index))
        numbers = np.unique(np.searchsorted(self._starts, index, "right") - 1).tolist()
        bounds = np.searchsorted(index, self._starts)
        parts = [
            (self._shard(number), slice(bounds[number], bounds[number + 1]), int(self._starts[number]))
            for number in numbers
        ]
        lines = torch.from_numpy(index)
        provenance = torch.empty(len(index), 4, dtype=torch.int64)
        for shard, span, start in parts:
            shard.gather_provenance(lines[span] - start, provenance[span])
        rows = {}
        for name, kind in self._hook_points.items():
            out = torch.empty(len(index), kind.d_in, dtype=DTYPES[kind.dtype])
            target = out if back is None else staging.setdefault(name, torch.empty_like(out))[: len(index)]
            for shard, span, start in parts:
                shard.gather(name, lines[span] - start, target[span])
            rows[name] = out if back is None else torch.index_select(target, 0, back, out=out)
        return rows, provenance if back is None else provenance[back]

    def _shard(self, number: int) -> OpenShard:
        found = self._open.get(number)
        if found is None:
            shard = self._catalog.shards[number]
            path = local_path(shard.folder, shard.file, shard.nbytes, shard.sha256, self._copies)
            if self._checksums and number not in self._checked:
                check_sum(shard, path)
                self._checked.add(number)
            if shard.storage == "bare":
                found = open_bare(path, self._bare_hook)
            else:
                found = open_shard(path, self._catalog.hook_points, shard.storage, shard.rows)
            self._open[number] = found
        return found

    def _read_ahead(self, shard: Shard) -> None:
        if not isinstance(shard.folder, LocalFolder):
            self._copies.fetch(shard.folder, shard.file, shard.nbytes, shard.sha256)
        elif hasattr(os, "posix_fadvise"):
            try:
                file = os.open(shard.folder.path / shard.file, os.O_RDONLY)
            except FileNotFoundError as error:
                raise DamagedShardError(f"{shard.where} is missing") from error
            try:
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(file)


def shard_starts(shards: Sequence[Shard]) -> NDArray[np.int64]:
    """Number of each shard's first row, and of the row behind the last: int64 `(shards + 1,)`."""
    return np.cumsum([0, *(shard.rows for shard in shards)])


def chosen_hook_points(catalog: Catalog, only: Sequence[str] | None) -> dict[str, Rows]:
    """What the rows of the named hook points are; of all by default.

    Raises:
        ShardError: the cache has no such hook point.
    """
    missing = [name for name in only or () if name not in catalog.hook_points]
    if missing:
        raise ShardError(
            f"the shards hold {', '.join(catalog.hook_points)}, not {', '.join(missing)}: choose among "
            "those, or extract again"
        )
    return {name: catalog.hook_points[name] for name in only or catalog.hook_points}


def check_sum(shard: Shard, path: Path) -> None:
    """Refuse a shard whose bytes are not those that were written.

    Raises:
        DamagedShardError: its checksum differs.
    """
    if shard.sha256 is not None and (found := sha256_of(path)) != shard.sha256:
        raise DamagedShardError(
            f"{shard.where} is altered: its checksum is {found}, its sidecar says {shard.sha256}. Copy it "
            "again, or delete it and run the extract command again"
        )
