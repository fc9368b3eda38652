"""Write and read `index.json`, the list of all shards of a finished cache, and the marks of ranks that have finished."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from deeplens_lightning.disk.records import Count, Digest, Positive, to_plain
from deeplens_lightning.shards.errors import DamagedShardError
from deeplens_lightning.shards.folder import Folder
from deeplens_lightning.shards.format import Manifest, dump_json, read_json, read_small
from deeplens_lightning.shards.names import (
    INDEX,
    MANIFEST,
    ShardName,
    done_name,
    rank_of,
    shard_name,
    sidecar_name,
)
from deeplens_lightning.shards.sidecar import Sidecar, Written, check_next, read_sidecars

FIX = "Delete it and run the command that wrote it again"


@dataclass(frozen=True, slots=True, kw_only=True)
class DoneMark:
    """Content of the file that says that a rank has written all of its rows.

    Attributes:
        shards: number of shards of the rank.
        rows: number of rows in them.
        dropped: rows that the rank has left out because they held NaN or infinity.
        manifest: `identity` of the manifest that it belongs to; None in format version 1.
    """

    shards: Count
    rows: Count
    dropped: Count
    manifest: Digest | None = None

    def dump(self) -> bytes:
        """The content of the file."""
        return dump_json(to_plain(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexEntry:
    """One shard in `index.json`; the fields are the keys of the file, in this order.

    Attributes:
        file: file name of the shard.
        rows: number of rows in it.
        nbytes: its size in bytes.
        sha256: its checksum in hexadecimal.
    """

    file: ShardName
    rows: Positive
    nbytes: Positive
    sha256: Digest

    @classmethod
    def of(cls, sidecar: Sidecar) -> IndexEntry:
        """The entry of a shard."""
        return cls(file=sidecar.file, rows=sidecar.rows, nbytes=sidecar.nbytes, sha256=sidecar.sha256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """Content of `index.json`.

    Attributes:
        manifest: digest of the manifest; None in format version 1.
        sidecars: SHA-256 of the contents of all sidecars, one after the other; None in format version 1.
        rows: number of rows of all shards.
        nbytes: their size in bytes.
        shards: all shards, by rank and number.
    """

    manifest: Digest | None = None
    sidecars: Digest | None = None
    rows: Count
    nbytes: Count
    shards: tuple[IndexEntry, ...]

    @classmethod
    def of(cls, manifest: Manifest, written: Sequence[Written]) -> Index:
        """The index of all shards of a cache."""
        entries = tuple(IndexEntry.of(each.sidecar) for each in written)
        return cls(
            manifest=manifest.digest,
            sidecars=digest_of_sidecars(each.data for each in written),
            rows=sum(entry.rows for entry in entries),
            nbytes=sum(entry.nbytes for entry in entries),
            shards=entries,
        )

    def dump(self) -> bytes:
        """The content of `index.json`."""
        return dump_json(to_plain(self))


def digest_of_sidecars(contents: Iterable[bytes]) -> str:
    """SHA-256 of the contents of all sidecars, one after the other, in hexadecimal."""
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content)
    return digest.hexdigest()


def write_index(folder: Folder) -> bool:
    """Write `index.json` if every rank has finished writing.

    Every rank calls this when it finishes. The last one writes the index, and no rank waits for another.

    Returns:
        Whether all ranks have finished, and so whether the index was written.

    Raises:
        DamagedShardError: the sidecars do not agree with each other, with the manifest or with the marks of the ranks.
    """
    sizes = folder.sizes()
    manifest = read_manifest(folder, sizes)
    if not all(done_name(rank) in sizes for rank in range(manifest.world_size)):
        return False
    marks = {rank: read_mark(folder, sizes, rank, manifest) for rank in range(manifest.world_size)}
    names = [shard_name(rank, number) for rank, mark in marks.items() for number in range(mark.shards)]
    missing = [name for name in names if name not in sizes or sidecar_name(name) not in sizes]
    if missing:
        raise DamagedShardError(
            f"{folder.where}/{missing[0]} or its sidecar is missing: run the command that wrote the cache again"
        )
    written = read_sidecars(folder, sizes, names, manifest)
    check_next(folder.where, [each.sidecar for each in written])
    for rank, mark in marks.items():
        check_mark(folder, rank, mark, [each.sidecar for each in written])
    folder.write(INDEX, Index.of(manifest, written).dump())
    return True


def read_manifest(folder: Folder, sizes: Mapping[str, int]) -> Manifest:
    """The manifest of a cache.

    Args:
        folder: folder of the cache.
        sizes: bytes by file name, as `folder.sizes()` returns them.

    Raises:
        ShardError: it is missing, damaged, or of a newer version.
    """
    [data] = read_small(folder, sizes, [MANIFEST])
    return Manifest.parse(data, f"{folder.where}/{MANIFEST}")


def read_mark(folder: Folder, sizes: Mapping[str, int], rank: int, manifest: Manifest) -> DoneMark:
    """The mark of a rank that has finished.

    Args:
        folder: folder of the cache.
        sizes: bytes by file name, as `folder.sizes()` returns them.
        rank: number of the rank.
        manifest: manifest of the cache.

    Raises:
        ShardError: it is damaged, of a newer version, or of another cache.
    """
    where = f"{folder.where}/{done_name(rank)}"
    [data] = read_small(folder, sizes, [done_name(rank)])
    mark, _ = read_json(DoneMark, data, where, FIX)
    if manifest.version > 1 and mark.manifest != manifest.identity:
        raise DamagedShardError(f"{where} belongs to another cache than the {MANIFEST} beside it. {FIX}")
    return mark


def check_mark(folder: Folder, rank: int, mark: DoneMark, sidecars: Iterable[Sidecar]) -> None:
    """Compare the mark of a rank with the sidecars of its shards.

    Args:
        folder: folder of the cache.
        rank: number of the rank.
        mark: its mark.
        sidecars: of all shards of the cache, or of the rank.

    Raises:
        DamagedShardError: they count other shards or rows.
    """
    own = [sidecar for sidecar in sidecars if rank_of(sidecar.file) == rank]
    rows = sum(sidecar.rows for sidecar in own)
    if (len(own), rows) != (mark.shards, mark.rows) or (own and own[-1].dropped > mark.dropped):
        raise DamagedShardError(
            f"{folder.where}/{done_name(rank)} counts {mark.shards} shards with {mark.rows:,} rows and {mark.dropped} "
            f"left out, and there are {len(own)} shards with {rows:,} rows: copy the missing files again, or run the "
            "command that wrote it again"
        )


def read_index(folder: Folder, sizes: Mapping[str, int], manifest: Manifest) -> Index:
    """The index of a cache, whose shards are in order and add up.

    Args:
        folder: folder of the cache.
        sizes: bytes by file name, as `folder.sizes()` returns them.
        manifest: manifest of the cache.

    Raises:
        DamagedShardError: it is damaged or of another cache, or lists shards twice, out of order or with gaps.
        ShardError: the file is not an index of this package.
    """
    where = f"{folder.where}/{INDEX}"
    [data] = read_small(folder, sizes, [INDEX])
    index, _ = read_json(Index, data, where, FIX)
    if manifest.version > 1 and (index.manifest != manifest.digest or index.sidecars is None):
        raise DamagedShardError(f"{where} belongs to another cache than the {MANIFEST} beside it. {FIX}")
    counts: dict[int, int] = {}
    for entry in index.shards:
        rank = rank_of(entry.file)
        number = counts.get(rank, 0)
        if (
            entry.file != shard_name(rank, number)
            or rank < max(counts, default=0)
            or rank >= manifest.world_size
        ):
            raise DamagedShardError(f"{where} lists {entry.file} twice, out of order, or after a gap. {FIX}")
        counts[rank] = number + 1
    totals = sum(entry.rows for entry in index.shards), sum(entry.nbytes for entry in index.shards)
    if totals != (index.rows, index.nbytes):
        raise DamagedShardError(f"{where} has totals that are not the sums over its shards. {FIX}")
    return index


def is_whole(folder: Folder, sizes: Mapping[str, int], manifest: Manifest) -> bool:
    """Whether every shard of the index exists with the size in the index, and has a sidecar.

    Args:
        folder: folder of the cache.
        sizes: bytes by file name, as `folder.sizes()` returns them.
        manifest: manifest of the cache.
    """
    return all(
        sizes.get(entry.file) == entry.nbytes and sidecar_name(entry.file) in sizes
        for entry in read_index(folder, sizes, manifest).shards
    )
