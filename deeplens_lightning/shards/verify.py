"""Verify a cache: compare all files with each other, and every byte with its checksum; upgrade an older version."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np

from deeplens_lightning.options import CACHE_BYTES
from deeplens_lightning.shards.catalog import Catalog, Shard, list_shards
from deeplens_lightning.shards.errors import DamagedShardError, ShardError, UnreachableError
from deeplens_lightning.shards.frame import read_frame
from deeplens_lightning.shards.local_copies import LocalCopies, local_path
from deeplens_lightning.shards.names import INDEX, done_name
from deeplens_lightning.shards.open_folder import open_folder
from deeplens_lightning.shards.opening import check_finite, check_sum, open_listed
from deeplens_lightning.shards.paths import ShardPath
from deeplens_lightning.shards.sidecar import FIX, Documents
from deeplens_lightning.shards.upgrade import upgrade_cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Result of `verify`.

    Attributes:
        shards: number of shards that could be listed.
        rows: number of rows in them.
        nbytes: their size in bytes.
        finished: whether nothing is left to write; an unfinished cache may have been longer.
        problems: one message for each problem, with the fix; empty if all is well.
        upgraded: folders of the caches that were rewritten in the present format version.
    """

    shards: int
    rows: int
    nbytes: int
    problems: list[str]
    finished: bool = True
    upgraded: tuple[str, ...] = ()


def verify(
    paths: ShardPath | Iterable[ShardPath],
    hook: str | None = None,
    cache_bytes: int = CACHE_BYTES,
    upgrade: bool = False,
) -> Report:
    """Read all shards at some paths; compare them with their checksums and documents, and all files with each other.

    Every problem is reported that can be found. Without a manifest or a readable index the shards are not known, and this
    is the only problem of that folder.

    Args:
        paths: one or several folders that `extract` wrote, `.pt` files, folders of bare `.pt` files, or globs of any
            of these; local or fsspec URLs.
        hook: hook name for bare tensors (default: from DeepLens's file names, else `activations`).
        cache_bytes: limit on the local copies of remote shards, in bytes.
        upgrade: if there is no problem, rewrite the JSON files of caches of format version 1 in the present version.

    Raises:
        ShardError: a cache that is to be rewritten is being written by another process, or not given as a whole.
        UnreachableError: a server refuses, fails or does not answer while shards are read.
    """
    given = [paths] if isinstance(paths, str) or not isinstance(paths, Iterable) else list(paths)
    copies = LocalCopies(max_bytes=cache_bytes)
    problems: list[str] = []
    try:
        try:
            catalog = list_shards(given, hook, copies, partial(_note, problems))
        except ShardError as error:
            return Report(shards=0, rows=0, nbytes=0, problems=[*problems, str(error)], finished=False)
        for shard in catalog.shards:
            try:
                _check(catalog, shard, hook, copies)
            except ShardError as error:
                _note(problems, error)
        problems += [problem for where in catalog.manifests for problem in _missing_marks(catalog, where)]
        upgraded = _upgrade_all(catalog, copies) if upgrade and not problems else ()
        return Report(
            shards=len(catalog.shards),
            rows=catalog.rows,
            nbytes=catalog.nbytes,
            problems=problems,
            finished=catalog.finished,
            upgraded=upgraded,
        )
    finally:
        copies.close()


def _note(problems: list[str], error: ShardError) -> None:
    """Add what is wrong with a shard to the problems; raise it again if the others cannot be read either."""
    if isinstance(error, UnreachableError):
        raise error
    problems.append(str(error))


def _check(catalog: Catalog, shard: Shard, hook: str | None, copies: LocalCopies) -> None:
    """Check the content of a shard; raise a ShardError if something is wrong."""
    with local_path(shard.folder, shard.file, shard.nbytes, shard.sha256, copies) as path:
        check_sum(shard, path)
        opened = open_listed(shard, path, catalog.hook_points, hook)
    for rows in (*opened.rows.values(), *opened.scales.values()):
        if rows.is_floating_point():
            check_finite(shard.where, rows if rows.ndim == 2 else rows.unsqueeze(1))
    if shard.storage == "bare":
        return
    found, lengths = Documents.of(opened.provenance.numpy()).arrays()
    if not (np.array_equal(found, shard.document_hashes) and np.array_equal(lengths, shard.document_rows)):
        raise DamagedShardError(
            f"{shard.where} holds rows of other documents than its sidecar says, which decides what is held out. {FIX}"
        )


def _missing_marks(catalog: Catalog, where: str) -> list[str]:
    """Messages for the ranks of a finished cache whose marks are missing; nothing that reading needs."""
    sizes = open_folder(where).sizes()
    ranks = range(catalog.manifests[where].world_size) if INDEX in sizes else ()
    return [
        f"{where}/{done_name(rank)} is missing: copy it again, or delete {INDEX} and run the command that wrote the "
        "cache again"
        for rank in ranks
        if done_name(rank) not in sizes
    ]


def _upgrade_all(catalog: Catalog, copies: LocalCopies) -> tuple[str, ...]:
    """Rewrite the caches of format version 1; the folders of those that were rewritten."""
    old = {where: manifest for where, manifest in catalog.manifests.items() if manifest.version == 1}
    for where, manifest in old.items():
        frames = {}
        for shard in catalog.shards:
            if shard.folder.where == where:
                with local_path(shard.folder, shard.file, shard.nbytes, shard.sha256, copies) as path:
                    frames[shard.file] = read_frame(path)
        upgrade_cache(open_folder(where), manifest, frames)
    return tuple(old)
