"""Find finished shards of a rank; delete incomplete files; notice a folder that is not the same any more."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from itertools import count

from deeplens_lightning.shards.errors import FolderLostError, ShardError
from deeplens_lightning.shards.folder import Folder
from deeplens_lightning.shards.format import Manifest
from deeplens_lightning.shards.index import check_mark, read_manifest, read_mark
from deeplens_lightning.shards.names import INDEX, done_name, parse_shard_name, shard_name, sidecar_name
from deeplens_lightning.shards.sidecar import Sidecar, check_next, read_sidecars

log = logging.getLogger(__name__)


def finished_shards(folder: Folder, rank: int, manifest: Manifest) -> list[Sidecar]:
    """Sidecars of a rank's finished shards, from number 0 to the first one that is missing.

    Unfinished files of the rank are deleted.

    Raises:
        DamagedShardError: a shard has another size than its sidecar says, or a sidecar is damaged, of another cache, or
            does not continue the one before it.
    """
    folder.clean()
    sizes = folder.sizes()
    sidecars: list[Sidecar] = []
    for number in count():
        name = shard_name(rank, number)
        if sidecar_name(name) not in sizes:
            break
        if name not in sizes:
            log.warning(
                "%s/%s is missing: it and the shards after it will be written again", folder.where, name
            )
            break
        [written] = read_sidecars(folder, sizes, [name], manifest)
        sidecars.append(written.sidecar)
    check_next(folder.where, sidecars)
    return sidecars


def is_done(folder: Folder, rank: int, sidecars: Sequence[Sidecar], manifest: Manifest) -> bool:
    """Whether a rank has finished: its mark exists, and no shard that it counts is missing.

    Raises:
        DamagedShardError: the mark is damaged or of another cache, or counts fewer shards or other rows.
    """
    sizes = folder.sizes()
    if done_name(rank) not in sizes:
        return False
    mark = read_mark(folder, sizes, rank, manifest)
    if mark.shards > len(sidecars):
        return False
    check_mark(folder, rank, mark, sidecars)
    return True


def delete_after(folder: Folder, rank: int, shards: int) -> None:
    """Delete a rank's files after its first `shards` shards, its done file, and the index.

    The index goes first and then the last shard, so that what is left at any moment is the beginning of a cache.
    """
    folder.remove(INDEX)
    folder.remove(done_name(rank))
    for name in reversed(folder.sizes()):
        shard = name.replace(".json", ".pt")
        parsed = parse_shard_name(shard)
        if parsed is not None and parsed[0] == rank and parsed[1] >= shards:
            folder.remove(sidecar_name(shard))
            folder.remove(shard)


def check_same_folder(folder: Folder, manifest: Manifest, rank: int, shards: int, coming: str) -> None:
    """Check before a file is written that the folder still holds the cache, with all that this rank has written.

    Args:
        folder: the folder.
        manifest: the manifest that the folder held at first.
        rank: number of the rank that writes.
        shards: number of its finished shards.
        coming: name of the file that comes next.

    Raises:
        FolderLostError: the folder was removed, emptied or replaced.
        ShardError: another process has written the file that comes next.
    """
    names = [shard_name(rank, number) for number in range(shards)]
    lost, same = shards, False
    with suppress(ShardError, NotADirectoryError):
        sizes = folder.sizes()
        lost = sum(name not in sizes or sidecar_name(name) not in sizes for name in names)
        same = read_manifest(folder, sizes).identity == manifest.identity
    if lost or not same:
        raise folder_lost(folder, rank, lost)
    if coming in sizes:
        raise ShardError(
            f"{folder.where}/{coming} appeared while this process was writing it: another process "
            "writes to the same folder. Stop one of them and run the other again"
        )


def folder_lost(folder: Folder, rank: int, shards: int) -> FolderLostError:
    """The error that says that a folder was removed or replaced, with `shards` finished shards of a rank."""
    return FolderLostError(
        f"{folder.where} was removed, emptied or replaced while rank {rank} was writing to it, and {shards} finished "
        "shard(s) of this rank are lost: put the folder back, or remove what is in its place, and run the same command "
        "again, which writes what is missing; a training continues from its last checkpoint without write_shards "
        "(--data.write_shards null)"
    )
