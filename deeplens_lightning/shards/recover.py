"""Find finished shards of a rank; delete incomplete files."""

from __future__ import annotations

import logging
from itertools import count

from deeplens_lightning.shards.errors import DamagedShardError
from deeplens_lightning.shards.folder import Folder
from deeplens_lightning.shards.format import Sidecar, parse_json
from deeplens_lightning.shards.names import INDEX, done_name, parse_shard_name, shard_name, sidecar_name

log = logging.getLogger(__name__)


def finished_shards(folder: Folder, rank: int) -> list[Sidecar]:
    """Sidecars of a rank's finished shards, from number 0 to the first one that is missing.

    Unfinished files of the rank are deleted.

    Raises:
        DamagedShardError: a shard has another size than its sidecar says.
    """
    folder.clean(f"rank{rank:05d}")
    sizes = folder.sizes()
    sidecars: list[Sidecar] = []
    for number in count():
        name = shard_name(rank, number)
        side = sidecar_name(name)
        if side not in sizes:
            break
        sidecar = Sidecar.parse(folder.read(side), f"{folder.where}/{side}")
        if name not in sizes:
            log.warning(
                "%s/%s is missing: it and the shards after it will be written again", folder.where, name
            )
            break
        if sizes[name] != sidecar.nbytes:
            raise DamagedShardError(
                f"{folder.where}/{name} has {sizes[name]:,} bytes, its sidecar says {sidecar.nbytes:,}: delete it and "
                "run again; it and the shards after it will then be written again"
            )
        sidecars.append(sidecar)
    return sidecars


def is_done(folder: Folder, rank: int, shards: int) -> bool:
    """Whether a rank's done file exists and counts `shards` shards."""
    mark = done_name(rank)
    if mark not in folder.sizes():
        return False
    return bool(parse_json(folder.read(mark), f"{folder.where}/{mark}").get("shards") == shards)


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
