"""What an earlier writer of the same rank left: its finished shards, and debris to clear away."""

from __future__ import annotations

import logging
from itertools import count

from deeplens_lightning.shards.errors import DamagedShardError
from deeplens_lightning.shards.folder import Folder
from deeplens_lightning.shards.format import (
    INDEX,
    Sidecar,
    done_name,
    parse_json,
    parse_shard_name,
    shard_name,
    sidecar_name,
)

log = logging.getLogger(__name__)


def finished_shards(folder: Folder, rank: int) -> list[Sidecar]:
    """A rank's finished shards from its first to the first that is missing.

    Raises:
        DamagedShardError: one is there and has another size than its sidecar says.
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
            log.warning("%s/%s is missing: it and what follows it is written again", folder.where, name)
            break
        if sizes[name] != sidecar.nbytes:
            raise DamagedShardError(
                f"{folder.where}/{name} has {sizes[name]:,} bytes, its sidecar says {sidecar.nbytes:,}: "
                "delete it and run again; it and what follows it is then written again"
            )
        sidecars.append(sidecar)
    return sidecars


def is_done(folder: Folder, rank: int, shards: int) -> bool:
    """Whether a rank said that it is done, and all of its shards are there."""
    mark = done_name(rank)
    if mark not in folder.sizes():
        return False
    return bool(parse_json(folder.read(mark), f"{folder.where}/{mark}").get("shards") == shards)


def forget_after(folder: Folder, rank: int, shards: int) -> None:
    """Remove a rank's files beyond its first `shards` shards, and the marks that say it was done."""
    folder.remove(INDEX)
    folder.remove(done_name(rank))
    for name in folder.sizes():
        shard = name.replace(".json", ".pt")
        parsed = parse_shard_name(shard)
        if parsed is not None and parsed[0] == rank and parsed[1] >= shards:
            folder.remove(sidecar_name(shard))
            folder.remove(shard)
