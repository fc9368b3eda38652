"""Verify a cache: compare sizes and checksums, and check the contents of every shard."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from deeplens_lightning.options import CACHE_BYTES
from deeplens_lightning.shards.catalog import Catalog, Shard, open_catalog
from deeplens_lightning.shards.errors import DamagedShardError, ShardError, UnreachableError
from deeplens_lightning.shards.gather import check_sum
from deeplens_lightning.shards.local_copies import LocalCopies, local_path
from deeplens_lightning.shards.paths import ShardPath
from deeplens_lightning.shards.tensors import open_bare, open_shard


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Result of `verify`.

    Attributes:
        shards: number of shards.
        rows: number of rows in them.
        nbytes: their size in bytes.
        problems: one message for each damaged shard, with the fix; empty if all is well.
    """

    shards: int
    rows: int
    nbytes: int
    problems: list[str]


def verify(
    paths: ShardPath | Iterable[ShardPath], hook: str | None = None, cache_bytes: int = CACHE_BYTES
) -> Report:
    """Read all shards at some paths and compare them with their checksums.

    Every shard with damaged content is reported. If a file is missing or has a wrong size, the shards cannot be listed,
    and this is the only problem reported.

    Args:
        paths: one or several folders that `extract` wrote, `.pt` files, folders of bare `.pt` files, or globs of any
            of these; local or fsspec URLs.
        hook: hook name for bare tensors (default: from DeepLens's file names, else `activations`).
        cache_bytes: limit on the local copies of remote shards, in bytes.

    Raises:
        UnreachableError: a server refuses, fails or does not answer while shards are read.
    """
    copies = LocalCopies(max_bytes=cache_bytes)
    try:
        try:
            catalog = open_catalog(paths, hook, copies)
        except ShardError as error:
            return Report(shards=0, rows=0, nbytes=0, problems=[str(error)])
        found = [_problem(catalog, shard, hook, copies) for shard in catalog.shards]
        problems = [problem for problem in found if problem is not None]
        return Report(shards=len(catalog.shards), rows=catalog.rows, nbytes=catalog.nbytes, problems=problems)
    finally:
        copies.close()


def _problem(catalog: Catalog, shard: Shard, hook: str | None, copies: LocalCopies) -> str | None:
    """What is wrong with a shard; None if nothing is."""
    try:
        with local_path(shard.folder, shard.file, shard.nbytes, shard.sha256, copies) as path:
            check_sum(shard, path)
            if shard.storage == "bare":
                [rows] = open_bare(path, hook).rows.values()
                _check_finite(shard.where, rows)
            else:
                open_shard(path, catalog.hook_points, shard.storage, shard.rows)
    except UnreachableError:
        raise  # the shards after this one cannot be read either
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
