"""Write, read and compare sidecars, the JSON file beside each finished shard.

In: the sidecars of a cache. Out: `Sidecar` records that agree with the manifest, the files and each other.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deeplens_lightning.disk.records import Count, Digest, Positive, to_plain
from deeplens_lightning.shards.errors import DamagedShardError, ShardError
from deeplens_lightning.shards.folder import Folder
from deeplens_lightning.shards.format import Manifest, Resume, dump_json, read_json, read_small
from deeplens_lightning.shards.frame import Frame
from deeplens_lightning.shards.names import MANIFEST, ShardName, rank_of, sidecar_name

FIX = "Copy it again, or delete it and run the command that wrote it again"
_OVERHEAD = 2**16  # bytes of a shard file beside its rows, at most (the zip directory)


@dataclass(frozen=True, slots=True, kw_only=True)
class Documents:
    """Runs of consecutive rows of one document in a shard.

    Attributes:
        runs: number of runs.
        hashes: text hash of each run, base64 of little-endian int64.
        rows: rows in each run, base64 of little-endian int32.

    Raises:
        ShardError: the numbers of runs differ, or a run has no rows.
    """

    runs: Count
    hashes: str
    rows: str

    def __post_init__(self) -> None:
        hashes, rows = self.arrays()
        if not self.runs == len(hashes) == len(rows) or (rows < 1).any():
            raise ShardError("it holds other runs than it counts")

    @classmethod
    def of(cls, provenance: NDArray[np.int64]) -> Documents:
        """The runs in the provenance of a shard, int64 `(n, 4)`: neighbours of equal document hash and index."""
        table = provenance[:, :2]
        starts = np.flatnonzero(np.concatenate([[True], (table[1:] != table[:-1]).any(axis=1)]))
        return cls(
            runs=len(starts),
            hashes=b64encode(table[starts, 0].astype("<i8").tobytes()).decode(),
            rows=b64encode(np.diff(np.append(starts, len(table))).astype("<i4").tobytes()).decode(),
        )

    def arrays(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Text hash and number of rows of each run, both int64 `(runs,)`."""
        hashes = np.frombuffer(b64decode(self.hashes, validate=True), "<i8")
        rows = np.frombuffer(b64decode(self.rows, validate=True), "<i4")
        return hashes.astype(np.int64), rows.astype(np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sidecar:
    """Content of a sidecar.

    Attributes:
        file: file name of the shard.
        rows: number of rows in it.
        nbytes: its size in bytes.
        sha256: its checksum in hexadecimal, as `sha256sum` prints it.
        manifest: `identity` of the manifest that it belongs to; None in format version 1.
        frame: what the shard holds beside the numbers of its tensors; None in format version 1.
        dropped: rows that the rank has left out up to here because they held NaN or infinity.
        next: where the rank continues after this shard.
        documents: the document of each row.

    Raises:
        ShardError: the rows of the documents are not those of the shard.
    """

    file: ShardName
    rows: Positive
    nbytes: Positive
    sha256: Digest
    manifest: Digest | None = None
    frame: Frame | None = None
    dropped: Count
    next: Resume
    documents: Documents

    def __post_init__(self) -> None:
        if int(self.documents.arrays()[1].sum()) != self.rows:
            raise ShardError("the rows of its documents do not add up to the rows of its shard")

    def dump(self) -> bytes:
        """The content of the sidecar file."""
        return dump_json(to_plain(self))

    @classmethod
    def parse(cls, data: bytes, where: str) -> Sidecar:
        """Parse the content of a sidecar file.

        Args:
            data: the content.
            where: the file's path, for messages.

        Raises:
            DamagedShardError: it is not a sidecar, or its numbers do not fit together.
            ShardError: it is of a newer version.
        """
        return read_json(cls, data, where, FIX)[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A sidecar, and the bytes that it was read from.

    Attributes:
        sidecar: the record.
        data: content of the file.
    """

    sidecar: Sidecar
    data: bytes


def read_sidecar(
    folder: Folder, sizes: Mapping[str, int], name: str, data: bytes, manifest: Manifest
) -> Written:
    """Read the sidecar of one shard, and compare it with the manifest and with the size of the shard.

    Args:
        folder: folder of the cache.
        sizes: bytes by file name, as `folder.sizes()` returns them.
        name: file name of the shard, which exists.
        data: content of the sidecar.
        manifest: manifest of the cache.

    Raises:
        DamagedShardError: the sidecar is damaged, belongs elsewhere, or the shard has another size.
    """
    where, side = f"{folder.where}/{name}", f"{folder.where}/{sidecar_name(name)}"
    sidecar = Sidecar.parse(data, side)
    if sidecar.file != name:
        raise DamagedShardError(
            f"{side} is the sidecar of {sidecar.file}, not of {name}: copy both files again from where the cache came "
            "from, or delete them and run the command that wrote it again"
        )
    if manifest.version > 1 and sidecar.manifest != manifest.identity:
        raise DamagedShardError(
            f"{side} belongs to another cache: it was not written for the {MANIFEST} beside it. Copy it and its shard "
            "again from where the cache came from, or delete them and run the command that wrote it again"
        )
    size = sizes[name]
    if size != sidecar.nbytes:
        raise DamagedShardError(
            f"{where} has {size:,} bytes, its sidecar says {sidecar.nbytes:,}: it is truncated or altered. {FIX}"
        )
    expected = sidecar.rows * manifest.row_bytes
    fits = expected <= size <= expected + _OVERHEAD + 1024 * len(manifest.hook_points)
    if sidecar.frame is not None:
        fits = fits and sum(length for _, length in sidecar.frame.payloads) == expected
    elif manifest.version > 1:
        raise DamagedShardError(f"{side} has no frame, which format version 2 needs. {FIX}")
    if not fits:
        raise DamagedShardError(
            f"{where} has {size:,} bytes for {sidecar.rows:,} rows; rows of the manifest's hook points take "
            f"{manifest.row_bytes} bytes each, so this shard has another d_in or dtype: copy it and {MANIFEST} again "
            "from where the cache came from"
        )
    return Written(sidecar=sidecar, data=data)


def read_sidecars(
    folder: Folder, sizes: Mapping[str, int], names: Sequence[str], manifest: Manifest
) -> list[Written]:
    """`read_sidecar` of several shards, in the order of `names`."""
    texts = read_small(folder, sizes, [sidecar_name(name) for name in names])
    return [
        read_sidecar(folder, sizes, name, text, manifest) for name, text in zip(names, texts, strict=True)
    ]


def check_next(where: str, sidecars: Iterable[Sidecar]) -> None:
    """Check that each rank continues after a shard with the row that follows those written and left out.

    Args:
        where: the folder, for messages.
        sidecars: of consecutive shards from the first of each rank.

    Raises:
        DamagedShardError: a sidecar says that rows are missing, or written twice.
    """
    rank, rows, dropped = -1, 0, 0
    for sidecar in sidecars:
        if rank_of(sidecar.file) != rank:
            rank, rows, dropped = rank_of(sidecar.file), 0, 0
        rows += sidecar.rows
        following = sidecar.next
        wrong = following.row != rows + sidecar.dropped or following.first_row > following.row
        if wrong or sidecar.dropped < dropped:
            raise DamagedShardError(
                f"{where}/{sidecar_name(sidecar.file)} continues with row {following.row} of a batch from row "
                f"{following.first_row}, after {rows} rows written and {sidecar.dropped} left out ({dropped} before this "
                f"shard): rows would be missing or written twice. {FIX}"
            )
        dropped = sidecar.dropped
