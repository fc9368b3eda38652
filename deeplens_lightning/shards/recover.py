"""Find finished shards of a rank; delete incomplete files."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import count

from deeplens_lightning.shards.folder import Folder
from deeplens_lightning.shards.format import Manifest
from deeplens_lightning.shards.index import check_mark, read_mark
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
    folder.clean(f"rank{rank:05d}")
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
    """Delete a rank's files after its first `shards` shards, its done file, and the index."""
    folder.remove(INDEX)
    folder.remove(done_name(rank))
    for name in folder.sizes():
        shard = name.replace(".json", ".pt")
        parsed = parse_shard_name(shard)
        if parsed is not None and parsed[0] == rank and parsed[1] >= shards:
            folder.remove(sidecar_name(shard))
            folder.remove(shard)
