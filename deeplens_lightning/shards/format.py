"""File formats of a cache: its files, `manifest.json`, and how its JSON files are written and read.

A cache is a folder:

    manifest.json               written first: what the rows are and where they came from
    rank00000-000000.pt         a shard: {"rows": {hook: (n, d_in)}, "provenance": (n, 4)}
    rank00000-000000.json       its sidecar, written after it: a shard without sidecar is not finished
    ...
    rank00000.done.json         this rank has written all of its rows
    index.json                  all ranks have; lists every shard with its size and checksum

Every JSON file holds a digest of its own content. A sidecar holds the checksum of its shard and the manifest's identity;
the index holds digests of the manifest and of all sidecars. `sidecar.py` and `index.py` have these files, `names.py` the
file names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from deeplens_lightning.disk.json_text import DIGEST, LIMIT, check_digest, digest_of, parse_object, signed
from deeplens_lightning.disk.records import Count, Positive, RecordError, read_record, to_plain
from deeplens_lightning.shards.errors import DamagedShardError, OtherConfigError, ShardError
from deeplens_lightning.shards.folder import Folder

T = TypeVar("T")

FORMAT = "deeplens-lightning shards"
VERSION = 2
"""Version of the format. Version 1 has no digests of its JSON files; it is read, and `verify --upgrade` rewrites it."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORAGES = ("exact", "int8")
UNNAMED = "activations"
"""Name of the rows of bare tensors whose hook point neither the file name nor the user says."""

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

    d_in: Positive
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
        shard_rows: rows of a full shard, which the writer sets; None if not known (format version 1); never compared.
        version: version of the format of its cache.

    Raises:
        ShardError: there is no hook point, or `storage` is unknown.
    """

    hook_points: Mapping[str, Rows]
    storage: str = "exact"
    config: Mapping[str, Any] = field(default_factory=dict)
    world_size: Positive = 1
    versions: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    shard_rows: Positive | None = None
    version: Positive = VERSION

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

    @property
    def identity(self) -> str:
        """SHA-256 of what determines the rows: hook points, storage, configuration and number of ranks.

        Sidecars hold it. Versions of libraries are not part of it, because ranks may differ in them.
        """
        return digest_of({**self.comparable(), "world_size": self.world_size})

    @property
    def digest(self) -> str:
        """SHA-256 of the whole content, as it stands in the file."""
        return str(json.loads(self.dump())[DIGEST])

    def dump(self) -> bytes:
        """The content of `manifest.json`."""
        return dump_json(to_plain(self))

    @classmethod
    def parse(cls, data: bytes, where: str) -> Manifest:
        """Parse the content of a `manifest.json`.

        Args:
            data: the content.
            where: the file's path, for messages.

        Raises:
            ShardError: it is not a manifest, or of a newer version.
        """
        manifest, version = read_json(cls, data, where, "Copy it again from where the cache was written")
        return replace(manifest, version=version)

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
        content = to_plain(self)
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
    first_row: Count
    row: Count


def dump_json(content: Mapping[str, Any]) -> bytes:
    """Content of a JSON file of a cache: format name, format version, `content` and a digest of it all, indented."""
    plain = json.loads(json.dumps({"format": FORMAT, "version": VERSION, **content}, allow_nan=False))
    return (json.dumps(signed(plain), indent=2) + "\n").encode()


def read_json(kind: type[T], data: bytes, where: str, fix: str) -> tuple[T, int]:
    """Read a JSON file of a cache: check its format name, version and digest, and the type and range of every field.

    Args:
        kind: dataclass with a field for each entry of the file.
        data: the file's content.
        where: the file's path, for messages.
        fix: what to do if it is damaged, for messages.

    Returns:
        The record, and the format version of the file.

    Raises:
        DamagedShardError: it is not JSON, was altered, or does not hold such a record.
        ShardError: another program wrote it, or it is of a newer version.
    """
    try:
        content = parse_object(data)
    except RecordError as error:
        raise DamagedShardError(f"{where} cannot be used: {error}. {fix}") from error
    if content.pop("format", None) != FORMAT:
        raise ShardError(
            f'{where} was not written by deeplens_lightning: it has no "format": "{FORMAT}". {fix}'
        )
    version = content.pop("version", None)
    if type(version) is not int or not 1 <= version <= VERSION:
        raise ShardError(
            f"{where} has format version {version!r} and this deeplens_lightning reads 1 to {VERSION}: "
            f"pip install --upgrade deeplens-lightning, or if the file is damaged: {fix}"
        )
    try:
        if version > 1:
            check_digest({"format": FORMAT, "version": version, **content})
            del content[DIGEST]
        return read_record(kind, content), version
    except RecordError as error:
        raise DamagedShardError(f"{where} is damaged: {error}. {fix}") from error


def read_small(folder: Folder, sizes: Mapping[str, int], names: Sequence[str]) -> list[bytes]:
    """Read JSON files of a cache.

    Args:
        folder: the folder.
        sizes: bytes by file name, as `folder.sizes()` returns them.
        names: names of the files.

    Raises:
        DamagedShardError: a file is missing, or so large that it is not one of a cache.
    """
    for name in names:
        if sizes.get(name, 0) > LIMIT:
            raise DamagedShardError(
                f"{folder.where}/{name} has {sizes[name]:,} bytes, more than any JSON file of a cache: copy it again "
                "from where the cache was written, or delete it and run the command that wrote it again"
            )
    return folder.read_many(names)


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
