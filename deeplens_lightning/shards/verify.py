"""Checking a cache from end to end: sizes, checksums, contents."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from deeplens_lightning.options import CACHE_BYTES
from deeplens_lightning.shards.catalog import Catalog, Shard, local_path, open_catalog
from deeplens_lightning.shards.errors import DamagedShardError, ShardError
from deeplens_lightning.shards.gather import check_sum
from deeplens_lightning.shards.paths import Source
from deeplens_lightning.shards.remote import LocalCopies
from deeplens_lightning.shards.tensors import open_bare, open_shard


@dataclass(frozen=True, slots=True)
class Report:
    """What `verify` found: how much there is, and a sentence for everything that is wrong."""

    shards: int
    rows: int
    nbytes: int
    problems: list[str]


def verify(
    sources: Source | Iterable[Source], hook: str | None = None, cache_bytes: int = CACHE_BYTES
) -> Report:
    """Read every byte of some shards and compare it with what was written.

    Damage to a shard's content is reported for each shard; damage that keeps the cache from being
    listed (a missing file, a wrong size) is the one problem reported.

    Args:
        sources: as for `ShardStream`.
        hook: hook name for bare tensors.
        cache_bytes: bound on local copies of remote shards.
    """
    copies = LocalCopies(max_bytes=cache_bytes)
    try:
        try:
            catalog = open_catalog(sources, hook, copies)
        except ShardError as error:
            return Report(0, 0, 0, [str(error)])
        found = [_problem(catalog, shard, hook, copies) for shard in catalog.shards]
        problems = [problem for problem in found if problem is not None]
        return Report(len(catalog.shards), catalog.rows, catalog.nbytes, problems)
    finally:
        copies.close()


def _problem(catalog: Catalog, shard: Shard, hook: str | None, copies: LocalCopies) -> str | None:
    """What is wrong with a shard, if anything is."""
    try:
        path = local_path(shard.folder, shard.file, shard.nbytes, shard.sha256, copies)
        check_sum(shard, path)
        if shard.storage == "bare":
            [rows] = open_bare(path, hook).rows.values()
            _check_finite(shard.where, rows)
        else:
            open_shard(path, catalog.hook_points, shard.storage, shard.rows)
    except ShardError as error:
        return str(error)
    return None


def _check_finite(where: str, rows: Tensor, piece: int = 2**14) -> None:
    parts = (rows[start : start + piece] for start in range(0, len(rows), piece))
    bad = sum(int((~torch.isfinite(part).all(dim=1)).sum().item()) for part in parts)
    if bad:
        raise DamagedShardError(
            f"{where} holds NaN or infinity in {bad} of {len(rows)} rows: extract it again"
        )
