"""Taking rows out of shards: mapped files, read in the order in which the rows lie.

In: numbers of rows. Out: these rows and their provenance.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deeplens_lightning.shards.catalog import Catalog, Shard, local_path
from deeplens_lightning.shards.errors import DamagedShardError, ShardError
from deeplens_lightning.shards.folder import LocalFolder
from deeplens_lightning.shards.format import DTYPES, Rows
from deeplens_lightning.shards.remote import LocalCopies
from deeplens_lightning.shards.save import sha256_of
from deeplens_lightning.shards.tensors import Integers, OpenShard, open_bare, open_shard

PIECES = 8
"""Into so many random samples a batch is cut, each of which is in the order of the disk."""
READS = 128
"""Pieces get fewer where this many reads a batch would not do."""


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

    def take(self, index: Integers) -> tuple[dict[str, Tensor], Tensor]:
        """Some rows and their provenance.

        An index in ascending order is kept to. Any other is meant as a random sample: it is cut into up to
        `PIECES` pieces, each a smaller sample, and the rows of a piece come in the order in which they lie,
        since reading them in another order or moving them once more would take twice the time.

        Args:
            index: numbers of rows, int64 `(n,)`.

        Returns:
            Rows `(n, d_in)` by hook name, and their provenance, int64 `(n, 4)`.
        """
        pieces, shards = 1, len(self._starts) - 1
        if (index[1:] < index[:-1]).any():
            few = shards * PIECES <= READS
            touched = shards if few else len(np.unique(np.searchsorted(self._starts, index, "right")))
            pieces = max(1, min(PIECES, READS // touched))
        total = int(self._starts[-1])
        offsets = np.arange(pieces) * total
        key = np.sort(index + np.repeat(offsets, -(-len(index) // pieces))[: len(index)])
        firsts = (offsets[:, None] + self._starts[:-1]).ravel()
        sizes = np.diff(np.searchsorted(key, firsts), append=len(key))
        here = torch.from_numpy(key - np.repeat(firsts, sizes)).split(sizes.tolist())
        rows = {
            name: torch.empty(len(index), kind.d_in, dtype=DTYPES[kind.dtype])
            for name, kind in self._hook_points.items()
        }
        provenance = torch.empty(len(index), 4, dtype=torch.int64)
        parts = {name: out.split(sizes.tolist()) for name, out in rows.items()}
        origins = provenance.split(sizes.tolist())
        for at in np.flatnonzero(sizes).tolist():
            shard = self._shard(at % shards)
            shard.gather_provenance(here[at], origins[at])
            for name, part in parts.items():
                shard.gather(name, here[at], part[at])
        return rows, provenance

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


def shard_starts(shards: Sequence[Shard]) -> Integers:
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
