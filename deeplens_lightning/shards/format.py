"""File formats of a cache: `manifest.json`, one JSON sidecar per finished shard, and `index.json`.

A cache is a folder:

    manifest.json               written first: what the rows are and where they came from
    rank00000-000000.pt         a shard: {"rows": {hook: (n, d_in)}, "provenance": (n, 4)}
    rank00000-000000.json       its sidecar, written after it: a shard without sidecar is not finished
    ...
    rank00000.done.json         this rank has written all of its rows
    index.json                  all ranks have; lists every shard with its size and checksum

`names.py` makes and checks the file names.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deeplens_lightning.shards.errors import DamagedShardError, OtherConfigError, ShardError
from deeplens_lightning.shards.names import check_shard_name

FORMAT = "deeplens-lightning shards"
VERSION = 1

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORAGES = ("exact", "int8")
ADDED_ENTRIES = ("tokenizer", "chat_template", "attention", "compile", "buffer_size")
"""Names that caches and checkpoints of earlier releases do not record: where one is missing it is unknown, not other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Width and dtype of the rows of one hook point.

    Attributes:
        d_in: elements in a row, at least 1.
        dtype: the activation dtype: "float32", "bfloat16" or "float16".

    Raises:
        ShardError: another dtype, or `d_in` below 1.
    """

    d_in: int
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ShardError(f"dtype {self.dtype!r} cannot be cached; choose one of {', '.join(DTYPES)}")
        if self.d_in < 1:
            raise ShardError(f"d_in must be at least 1, got {self.d_in}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Content of `manifest.json`: the rows of a cache and the configuration that they were computed with.

    Two manifests describe the same cache if `hook_points`, `storage` and `config` are equal.

    Attributes:
        hook_points: `Rows` by canonical hook name; at least one.
        storage: `exact` (rows in the activation dtype), or `int8` (8 bits and one scale per row).
        config: model, dataset, packing and split as JSON values.
        world_size: number of ranks that write the cache.
        versions: of the libraries that the cache was started with, for people to read; never compared.
        extra: JSON values to keep beside the rows, such as activation statistics; never compared.

    Raises:
        ShardError: there is no hook point, or `storage` is unknown.
    """

    hook_points: Mapping[str, Rows]
    storage: str = "exact"
    config: Mapping[str, Any] = field(default_factory=dict)
    world_size: int = 1
    versions: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.hook_points:
            raise ShardError("a cache needs at least one hook point")
        if self.storage not in STORAGES:
            raise ShardError(f"storage={self.storage!r} is unknown; choose one of {', '.join(STORAGES)}")

    @property
    def row_bytes(self) -> int:
        """Bytes on disk of one row: of every hook point, and its provenance."""
        if self.storage == "int8":
            return 32 + sum(rows.d_in + 4 for rows in self.hook_points.values())
        return 32 + sum(rows.d_in * DTYPES[rows.dtype].itemsize for rows in self.hook_points.values())

    def dump(self) -> bytes:
        """The content of `manifest.json`."""
        return dump_json(asdict(self))

    @classmethod
    def parse(cls, data: bytes, where: str) -> Manifest:
        """Parse the content of a `manifest.json`.

        Args:
            data: the content.
            where: the file's path, for messages.

        Raises:
            ShardError: it is not a manifest, or of a newer version.
        """
        content = parse_json(data, where)
        try:
            hook_points = content["hook_points"]
            if not isinstance(hook_points, dict):
                raise TypeError("hook_points is not an object")
            return cls(
                hook_points={
                    name: Rows(d_in=rows["d_in"], dtype=rows["dtype"]) for name, rows in hook_points.items()
                },
                storage=content["storage"],
                config=content["config"],
                world_size=content["world_size"],
                versions=content["versions"],
                extra=content["extra"],
            )
        except (KeyError, TypeError) as error:
            raise ShardError(
                f"{where} is not the manifest of a cache ({error!r}): copy it again from where it was written"
            ) from error

    def check_same(self, other: Manifest, where: str) -> None:
        """Check that a cache can be continued: that `other` describes the same cache as this manifest.

        One of `ADDED_ENTRIES` that `other` lacks is not compared.

        Args:
            other: the manifest found in the folder.
            where: the folder, for messages.

        Raises:
            OtherConfigError: they differ; the message lists every difference.
        """
        lines = [
            f"  {key}: {there!r} there, {here!r} here"
            for key, there, here in differences(other.comparable(), self.comparable())
            if there is not None or key.removeprefix("config.") not in ADDED_ENTRIES
        ]
        if lines:
            raise OtherConfigError(
                f"{where} holds a cache of another configuration:\n"
                + "\n".join(lines)
                + "\nChoose another folder, or use the configuration that the cache was started with."
            )

    def comparable(self) -> dict[str, Any]:
        """Hook points, storage and configuration as JSON values: what must be equal to continue a cache."""
        content = asdict(self)
        kept = {key: content[key] for key in ("hook_points", "storage", "config")}
        result: dict[str, Any] = json.loads(json.dumps(kept))
        return result


@dataclass(frozen=True, slots=True)
class Resume:
    """Where a rank continues to write.

    Attributes:
        source: the `source` that `ShardWriter.append` got with the batch that holds the next row, as JSON values;
            None before the first row.
        first_row: number of that batch's first row among the rows of the rank.
        row: number of the next row to write. Rows with lower numbers are skipped.
    """

    source: Any
    first_row: int
    row: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sidecar:
    """Content of a sidecar, the JSON file of one finished shard.

    Attributes:
        file: file name of the shard.
        rows: number of rows in it.
        nbytes: its size in bytes.
        sha256: its checksum in hexadecimal, as `sha256sum` prints it.
        next: where the rank continues after this shard.
        dropped: rows that the rank has left out up to here because they held NaN or infinity.
        document_hashes: int64 `(runs,)`: text hash of each run of consecutive rows of one document.
        document_rows: int32 `(runs,)`: rows in each run.
    """

    file: str
    rows: int
    nbytes: int
    sha256: str
    next: Resume
    dropped: int
    document_hashes: NDArray[np.int64]
    document_rows: NDArray[np.int32]

    def dump(self) -> bytes:
        """The content of the sidecar file; document runs are base64 of little-endian integers."""
        content = {
            "file": self.file,
            "rows": self.rows,
            "nbytes": self.nbytes,
            "sha256": self.sha256,
            "dropped": self.dropped,
            "next": asdict(self.next),
            "documents": {
                "runs": len(self.document_rows),
                "hashes": b64encode(self.document_hashes.astype("<i8").tobytes()).decode(),
                "rows": b64encode(self.document_rows.astype("<i4").tobytes()).decode(),
            },
        }
        return dump_json(content)

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
        content = parse_json(data, where)
        try:
            documents, following = content["documents"], content["next"]
            sidecar = cls(
                file=content["file"],
                rows=content["rows"],
                nbytes=content["nbytes"],
                sha256=content["sha256"],
                dropped=content["dropped"],
                next=Resume(following["source"], following["first_row"], following["row"]),
                document_hashes=np.frombuffer(b64decode(documents["hashes"]), "<i8"),
                document_rows=np.frombuffer(b64decode(documents["rows"]), "<i4"),
            )
            counts = int(sidecar.document_rows.sum()), len(sidecar.document_rows)
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedShardError(
                f"{where} is not the sidecar of a shard ({error!r}): copy it again, or delete it and run the extract "
                "command again"
            ) from error
        check_shard_name(sidecar.file, where)
        if counts != (sidecar.rows, len(sidecar.document_hashes)):
            raise DamagedShardError(
                f"{where} is damaged: the rows of its documents do not add up to the rows of its shard. Copy it again, "
                "or delete it and run the extract command again"
            )
        return sidecar


def dump_json(content: Mapping[str, Any]) -> bytes:
    """Content of a JSON file of a cache: format name, format version, and `content`, indented."""
    return (json.dumps({"format": FORMAT, "version": VERSION, **content}, indent=2) + "\n").encode()


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON file of a cache and check its format name and version.

    Args:
        data: the file's content.
        where: the file's path, for messages.

    Raises:
        DamagedShardError: it is not JSON.
        ShardError: another program wrote it, or it is of a newer version.
    """
    try:
        content = json.loads(data)
    except ValueError as error:
        raise DamagedShardError(
            f"{where} is not valid JSON ({error}): delete it and run the extract command again"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ShardError(f'{where} was not written by deeplens_lightning: it has no "format": "{FORMAT}"')
    version = content.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise ShardError(
            f"{where} has format version {version!r} and this deeplens_lightning reads up to {VERSION}: "
            "pip install --upgrade deeplens-lightning"
        )
    return content


def differences(there: Any, here: Any, name: str = "") -> Sequence[tuple[str, Any, Any]]:
    """The differences between two JSON values: dotted name, value in `there`, value in `here`."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = [*there, *(key for key in here if key not in there)]
        return [
            difference
            for key in keys
            for difference in differences(
                there.get(key), here.get(key), f"{name}.{key}" if name else str(key)
            )
        ]
    return [] if there == here else [(name, there, here)]
