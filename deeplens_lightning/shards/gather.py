"""Gather rows from memory-mapped shards, in the order in which they are stored.

In: numbers of rows. Out: these rows and their provenance.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deeplens_lightning.shards.catalog import Catalog, Shard
from deeplens_lightning.shards.checksum import sha256_of
from deeplens_lightning.shards.errors import DamagedShardError, ShardError
from deeplens_lightning.shards.folder import LocalFolder
from deeplens_lightning.shards.format import DTYPES, Rows
from deeplens_lightning.shards.local_copies import LocalCopies, local_path
from deeplens_lightning.shards.tensors import Integers, OpenShard, open_bare, open_shard

PIECES = 8
"""Number of pieces that a shuffled batch is divided into; each piece is a random sample in ascending order."""
READS = 128
"""Target for the number of reads of a batch (pieces times shards); with more shards there are fewer pieces."""


class Gatherer:
    """Gather rows of a catalog by number.

    Args:
        catalog: the shards; rows are numbered from 0 through all of them.
        hook_points: `Rows` by canonical hook name, of the hook points to gather.
        copies: local copies of remote shards.
        bare_hook: hook name for bare tensors.
        checksums: compare every local shard with its checksum when it is first opened.
        pin_memory: return rows and provenance in pinned memory, which a CUDA device reads asynchronously.
    """

    def __init__(
        self,
        catalog: Catalog,
        hook_points: Mapping[str, Rows],
        copies: LocalCopies,
        bare_hook: str | None,
        checksums: bool,
        pin_memory: bool = False,
    ) -> None:
        self._catalog, self._hook_points, self._copies = catalog, hook_points, copies
        self._bare_hook, self._checksums, self._pin_memory = bare_hook, checksums, pin_memory
        self._starts = shard_starts(catalog.shards)
        self._open: dict[int, OpenShard] = {}
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
        self._open = {number: shard for number, shard in self._open.items() if number in near}
        for number in near:
            self._read_ahead(self._catalog.shards[number])

    def close(self) -> None:
        """Close all shards."""
        self._open.clear()

    def take(self, index: Integers) -> tuple[dict[str, Tensor], Tensor]:
        """Gather some rows and their provenance.

        Rows of an ascending index come in the order of the index. Any other index is treated as a random sample: it is
        divided into up to `PIECES` pieces, and the rows of each piece come in ascending order. Each piece is a random
        sample too. Reading in random order, or moving the rows a second time, would take twice the time.

        Args:
            index: numbers of rows, int64 `(n,)`.

        Returns:
            Rows `(n, d_in)` in the activation dtype by hook name, and their provenance, int64 `(n, 4)`.

        Raises:
            DamagedShardError: a shard is missing or damaged.
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
        here = key - np.repeat(firsts, sizes)
        ends = np.cumsum(sizes).tolist()
        rows = {
            name: torch.empty(len(index), kind.d_in, dtype=DTYPES[kind.dtype], pin_memory=self._pin_memory)
            for name, kind in self._hook_points.items()
        }
        provenance = torch.empty(len(index), 4, dtype=torch.int64, pin_memory=self._pin_memory)
        index_parts = torch.from_numpy(here).split(sizes.tolist())
        parts = {name: out.split(sizes.tolist()) for name, out in rows.items()}
        origins = provenance.numpy()
        for at in np.flatnonzero(sizes).tolist():
            shard = self._shard(at % shards)
            span = slice(ends[at - 1] if at else 0, ends[at])
            shard.gather_provenance(here[span], origins[span])
            for name, part in parts.items():
                shard.gather(name, index_parts[at], part[at])
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
        elif sys.platform == "linux":
            try:
                file = os.open(shard.folder.path / shard.file, os.O_RDONLY)
            except FileNotFoundError as error:
                raise DamagedShardError(f"{shard.where} is missing") from error
            try:
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(file)


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
            "those, or run the extract command with the others into another folder"
        )
    return {name: catalog.hook_points[name] for name in only or catalog.hook_points}


def check_sum(shard: Shard, path: Path) -> None:
    """Compare a shard with its checksum; a bare tensor has none and passes.

    Args:
        shard: the shard with the checksum.
        path: path of the local file to compare.

    Raises:
        DamagedShardError: the checksum differs.
    """
    if shard.sha256 is not None and (found := sha256_of(path)) != shard.sha256:
        raise DamagedShardError(
            f"{shard.where} is altered: its checksum is {found}, its sidecar says {shard.sha256}. Copy it "
            "again, or delete it and run the extract command again"
        )
