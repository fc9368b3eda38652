"""File names of a cache: make them, parse them, and check names that were read from a file.

A name read from a file is checked before use, so that no file can lead outside the cache's folder.
"""

from __future__ import annotations

import re

from deeplens_lightning.shards.errors import DamagedShardError

MANIFEST = "manifest.json"
INDEX = "index.json"

_SHARD = re.compile(r"rank(\d{5})-(\d{6})\.pt")


def shard_name(rank: int, number: int) -> str:
    """File name of a rank's shard, such as `rank00000-000000.pt`."""
    return f"rank{rank:05d}-{number:06d}.pt"


def sidecar_name(shard: str) -> str:
    """File name of a shard's sidecar, such as `rank00000-000000.json`."""
    return shard.removesuffix(".pt") + ".json"


def shard_of(sidecar: str) -> str | None:
    """File name of the shard of a sidecar; None if `sidecar` is not the name of a sidecar."""
    shard = sidecar.removesuffix(".json") + ".pt"
    return shard if sidecar.endswith(".json") and parse_shard_name(shard) else None


def done_name(rank: int) -> str:
    """Name of the file that says that a rank has written all of its rows, such as `rank00000.done.json`."""
    return f"rank{rank:05d}.done.json"


def parse_shard_name(name: str) -> tuple[int, int] | None:
    """Rank and number in the file name of a shard; None if `name` is not the name of a shard."""
    match = _SHARD.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


def check_shard_name(name: object, where: str) -> None:
    """Check that a name read from a file is the name of a shard, and not a path to somewhere else.

    Args:
        name: the name.
        where: the file that it was read from, for messages.

    Raises:
        DamagedShardError: it is not the name of a shard.
    """
    if not isinstance(name, str) or parse_shard_name(name) is None:
        raise DamagedShardError(
            f"{where} names {name!r}, which is not a shard of its own folder (such as 'rank00000-000000.pt'). Nothing "
            "was read; do not use this cache unless you know who wrote it"
        )
