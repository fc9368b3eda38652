"""List the shards of a cache, and compare manifest, index, sidecars, marks and files with each other.

In: a folder and the sizes of its files. Out: the sidecars that agree; whatever does not agree is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from deeplens_lightning.shards.errors import DamagedShardError, ShardError
from deeplens_lightning.shards.folder import Folder
from deeplens_lightning.shards.format import Manifest, read_small
from deeplens_lightning.shards.index import (
    FIX,
    Index,
    IndexEntry,
    check_mark,
    digest_of_sidecars,
    read_index,
    read_manifest,
    read_mark,
)
from deeplens_lightning.shards.names import (
    INDEX,
    done_name,
    parse_shard_name,
    shard_name,
    shard_of,
    sidecar_name,
)
from deeplens_lightning.shards.sidecar import Sidecar, Written, check_next, read_sidecar

log = logging.getLogger(__name__)

Refuse: TypeAlias = Callable[[ShardError], None]
"""What to do with an error: raise it, or note it and go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """What a cache holds.

    Attributes:
        manifest: its manifest.
        sidecars: of its finished shards, in order.
        finished: whether it has an index, so that no shard is still to be written.
    """

    manifest: Manifest
    sidecars: Sequence[Sidecar]
    finished: bool


def list_cache(
    folder: Folder, sizes: Mapping[str, int], files: Sequence[str] | None, refuse: Refuse
) -> Listing:
    """List the shards of a cache.

    Args:
        folder: folder of the cache.
        sizes: bytes by file name, as `folder.sizes()` returns them; with a manifest.
        files: file names of the shards to list; None for all, which are then compared with all files of the folder.
        refuse: called with everything that is wrong with single files. If it returns, the shard is left out.

    Raises:
        ShardError: the manifest or the index cannot be read, so that the shards are not known.
    """
    manifest = read_manifest(folder, sizes)
    if manifest.version == 1:
        log.warning(
            "%s has format version 1: it cannot be checked whether its JSON files are as written and its shards "
            "belong to its manifest; `deeplens-lightning verify %s --upgrade` checks its rows and writes version 2",
            folder.where,
            folder.where,
        )
    index = read_index(folder, sizes, manifest) if INDEX in sizes else None
    found = [shard for name in sizes if (shard := shard_of(name)) is not None]
    names = found if index is None else [entry.file for entry in index.shards]
    if index is None:
        log.warning(
            "%s is not finished: reading its %d finished shards; run the command that wrote it again (extract, or fit "
            "with write_shards) to continue",
            folder.where,
            len(names),
        )
        _check_gapless(folder, names, manifest, refuse)
    if files is None:
        _check_extra(folder, sizes, names, index, refuse)
    else:
        names = _chosen(folder, names, files)
    written = _read(folder, sizes, names, manifest, index, refuse)
    sidecars = [each.sidecar for each in written]
    if files is None and len(written) == len(names):
        _check_together(folder, sizes, manifest, index, written, refuse)
    return Listing(manifest=manifest, sidecars=sidecars, finished=index is not None)


def _read(
    folder: Folder,
    sizes: Mapping[str, int],
    names: Sequence[str],
    manifest: Manifest,
    index: Index | None,
    refuse: Refuse,
) -> list[Written]:
    """The sidecars of some shards, each compared with its shard, the manifest and the index."""
    present = []
    for name in names:
        missing = [each for each in (name, sidecar_name(name)) if each not in sizes]
        if not missing:
            present.append(name)
            continue
        refuse(
            DamagedShardError(
                f"{folder.where}/{missing[0]} is missing: copy it again from where the cache came from, or run "
                "the command that wrote the cache again, which writes the missing shards"
            )
        )
    entries = {entry.file: entry for entry in index.shards} if index is not None else {}
    written = []
    for name, text in zip(
        present, read_small(folder, sizes, [sidecar_name(name) for name in present]), strict=True
    ):
        try:
            each = read_sidecar(folder, sizes, name, text, manifest)
            if index is not None and entries[name] != IndexEntry.of(each.sidecar):
                raise DamagedShardError(
                    f"{folder.where}/{INDEX} and {sidecar_name(name)} say different things of {name}: copy all three "
                    "again from where the cache came from, or delete the index and run the command that wrote it again"
                )
            written.append(each)
        except ShardError as error:
            refuse(error)
    return written


def _check_together(
    folder: Folder,
    sizes: Mapping[str, int],
    manifest: Manifest,
    index: Index | None,
    written: Sequence[Written],
    refuse: Refuse,
) -> None:
    """Compare all sidecars of a cache with each other, with the index and with the marks of its ranks."""
    sidecars = [each.sidecar for each in written]
    try:
        check_next(folder.where, sidecars)
        if index is not None and index.sidecars not in (
            None,
            digest_of_sidecars(each.data for each in written),
        ):
            raise DamagedShardError(
                f"the sidecars of {folder.where} are not those that its {INDEX} was written for. {FIX}"
            )
    except ShardError as error:
        refuse(error)
    for rank in range(manifest.world_size):
        try:
            if done_name(rank) in sizes:
                check_mark(folder, rank, read_mark(folder, sizes, rank, manifest), sidecars)
        except ShardError as error:
            refuse(error)


def _check_extra(
    folder: Folder, sizes: Mapping[str, int], names: Sequence[str], index: Index | None, refuse: Refuse
) -> None:
    """Check that the folder of a finished cache holds no shard or sidecar that the index does not list."""
    known = {*names, *map(sidecar_name, names)}
    for name in sizes:
        is_part = parse_shard_name(name) is not None or shard_of(name) is not None
        if index is not None and is_part and name not in known:
            refuse(
                DamagedShardError(
                    f"{folder.where}/{INDEX} does not list {name}: delete that file if it came from elsewhere; else "
                    f"delete {INDEX} and run the command that wrote it again"
                )
            )


def _check_gapless(folder: Folder, names: Sequence[str], manifest: Manifest, refuse: Refuse) -> None:
    """Check that the shards of each rank are numbered without gaps, which shows a missing one without an index."""
    for name in names:
        rank, number = parse_shard_name(name) or (0, 0)
        if rank >= manifest.world_size:
            refuse(
                DamagedShardError(
                    f"{folder.where}/{name} is of another cache: this one was written by {manifest.world_size} rank(s). "
                    "Delete it, or copy the whole cache again"
                )
            )
        before = shard_name(rank, max(0, number - 1))
        if before not in names:
            refuse(
                DamagedShardError(
                    f"{folder.where}/{before} is missing and {name} is there: copy it again, or run the "
                    "command that wrote the cache again, which writes the missing shards"
                )
            )


def _chosen(folder: Folder, names: Sequence[str], files: Sequence[str]) -> list[str]:
    """The shards that the user named, in their order in the cache."""
    for name in files:
        if name not in names:
            raise ShardError(
                f"{folder.where}/{name} is not a finished shard of the cache in that folder: give the folder itself, "
                f"or one of its shards, such as {names[0] if names else shard_name(0, 0)}"
            )
    return [name for name in names if name in files]
