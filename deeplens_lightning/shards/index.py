"""Write and read `index.json`, the list of all shards of a finished cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from deeplens_lightning.shards.errors import DamagedShardError
from deeplens_lightning.shards.folder import Folder
from deeplens_lightning.shards.format import Sidecar, dump_json, parse_json
from deeplens_lightning.shards.names import INDEX, check_shard_name, done_name, shard_name, sidecar_name


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexEntry:
    """One shard in `index.json`; the fields are the keys of the file, in this order.

    Attributes:
        file: file name of the shard.
        rows: number of rows in it.
        nbytes: its size in bytes.
        sha256: its checksum in hexadecimal.
    """

    file: str
    rows: int
    nbytes: int
    sha256: str


def write_index(folder: Folder, world_size: int) -> bool:
    """Write `index.json` if every rank has finished writing.

    Every rank calls this when it finishes. The last one writes the index, and no rank waits for another.

    Returns:
        Whether all ranks have finished, and so whether the index was written.
    """
    sizes = folder.sizes()
    if not all(done_name(rank) in sizes for rank in range(world_size)):
        return False
    entries = []
    for rank in range(world_size):
        mark = parse_json(folder.read(done_name(rank)), f"{folder.where}/{done_name(rank)}")
        for number in range(mark["shards"]):
            name = sidecar_name(shard_name(rank, number))
            shard = Sidecar.parse(folder.read(name), f"{folder.where}/{name}")
            entries.append(
                IndexEntry(file=shard.file, rows=shard.rows, nbytes=shard.nbytes, sha256=shard.sha256)
            )
    content = {
        "rows": sum(entry.rows for entry in entries),
        "nbytes": sum(entry.nbytes for entry in entries),
        "shards": [asdict(entry) for entry in entries],
    }
    folder.write(INDEX, dump_json(content))
    return True


def read_index(folder: Folder) -> list[IndexEntry]:
    """The shards that `index.json` lists, in its order.

    Raises:
        DamagedShardError: the file lacks a key, or names a file outside the folder.
        ShardError: the file is not an index of this package.
    """
    where = f"{folder.where}/{INDEX}"
    content = parse_json(folder.read(INDEX), where)
    try:
        entries = [
            IndexEntry(file=shard["file"], rows=shard["rows"], nbytes=shard["nbytes"], sha256=shard["sha256"])
            for shard in content["shards"]
        ]
    except (KeyError, TypeError) as error:
        raise DamagedShardError(
            f"{where} is not a list of shards ({error!r}): delete it and run the extract command again"
        ) from error
    for entry in entries:
        check_shard_name(entry.file, where)
    return entries


def is_whole(folder: Folder, sizes: Mapping[str, int]) -> bool:
    """Whether every shard of the index exists with the size in the index, and has a sidecar.

    Args:
        folder: folder of the cache.
        sizes: bytes by file name, as `folder.sizes()` returns them.
    """
    return all(
        sizes.get(entry.file) == entry.nbytes and sidecar_name(entry.file) in sizes
        for entry in read_index(folder)
    )
