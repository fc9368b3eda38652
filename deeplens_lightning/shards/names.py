"""File names of a cache: make them, parse them, and check names that were read from a file.

A name read from a file is checked before use, so that no file can lead outside the cache's folder.
"""

from __future__ import annotations

import re
from typing import Annotated

from deeplens_lightning.disk.records import Matching

MANIFEST = "manifest.json"
INDEX = "index.json"

_SHARD = re.compile(r"rank([0-9]{5})-([0-9]{6})\.pt")

ShardName = Annotated[
    str, Matching(_SHARD.pattern, "the name of a shard of its own folder, such as 'rank00000-000000.pt'")
]
"""A name read from a file: the name of a shard, and not a path to somewhere else."""


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


def rank_of(shard: str) -> int:
    """Rank in the file name of a shard."""
    return int(shard[len("rank") : len("rank00000")])
