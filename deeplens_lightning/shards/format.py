"""The text files of a cache: `manifest.json`, one sidecar per finished shard, and `index.json`.

A cache is a folder:

    manifest.json               written first: what the rows are and where they came from
    rank00000-000000.pt         a shard: {"rows": {hook: (n, d_in)}, "provenance": (n, 4)}
    rank00000-000000.json       its sidecar, written after it: only now does the shard count
    ...
    rank00000.done.json         a rank has written all of its rows
    index.json                  all ranks have; every shard with its size and checksum

File names are derived or checked, never followed: nothing a file says leads outside its folder.
"""

from __future__ import annotations

import json
import re
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deeplens_lightning.shards.errors import DamagedShardError, OtherConfigError, ShardError

FORMAT = "deeplens-lightning shards"
VERSION = 1
MANIFEST = "manifest.json"
INDEX = "index.json"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORAGES = ("exact", "int8")

_SHARD = re.compile(r"rank(\d{5})-(\d{6})\.pt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What a row of one hook point is: its width `d_in` and its activation dtype by name."""

    d_in: int
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ShardError(f"dtype {self.dtype!r} cannot be cached; choose one of {', '.join(DTYPES)}")
        if self.d_in < 1:
            raise ShardError(f"d_in must be at least 1, got {self.d_in}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a cache holds. Equal `hook_points`, `storage` and `config` mean: the same cache.

    Attributes:
        hook_points: `Rows` by canonical hook name.
        storage: `exact` (the activation dtype), or `int8` (8 bits and one scale per row).
        config: JSON-able description of model, dataset, packing and split; compared as a whole.
        world_size: how many ranks write it.
        versions: of the libraries that began it, for people to read; never compared.
        extra: anything JSON-able to keep beside the rows (activation statistics); never compared.
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
        """Bytes on disk for one row of every hook point, provenance included."""
        if self.storage == "int8":
            return 32 + sum(rows.d_in + 4 for rows in self.hook_points.values())
        return 32 + sum(rows.d_in * DTYPES[rows.dtype].itemsize for rows in self.hook_points.values())

    def dump(self) -> bytes:
        """The text of `manifest.json`."""
        return dump_json(asdict(self))

    @classmethod
    def parse(cls, data: bytes, where: str) -> Manifest:
        """Read the text of a `manifest.json`; `where` names it in errors."""
        content = parse_json(data, where)
        try:
            hook_points = {name: Rows(**rows) for name, rows in content["hook_points"].items()}
            return cls(**{**{key: content[key] for key in _MANIFEST_FIELDS}, "hook_points": hook_points})
        except (KeyError, TypeError, AttributeError) as error:
            raise ShardError(f"{where} is no manifest of a cache: {error!r}") from error

    def check_same(self, other: Manifest, where: str) -> None:
        """Refuse to continue `other`, found at `where`, when it is another cache than this one.

        Raises:
            OtherConfigError: with every difference by name, there and here.
        """
        lines = [
            f"  {key}: {there!r} there, {here!r} here"
            for key, there, here in differences(other.comparable(), self.comparable())
        ]
        if lines:
            raise OtherConfigError(
                f"{where} holds a cache of another configuration:\n"
                + "\n".join(lines)
                + "\nChoose another folder, or the configuration that it was begun with."
            )

    def comparable(self) -> dict[str, Any]:
        """The part that decides whether two caches are the same, as plain JSON values."""
        content = asdict(self)
        kept = {key: content[key] for key in ("hook_points", "storage", "config")}
        result: dict[str, Any] = json.loads(json.dumps(kept))
        return result


_MANIFEST_FIELDS = ("hook_points", "storage", "config", "world_size", "versions", "extra")


@dataclass(frozen=True, slots=True)
class Resume:
    """Where a rank goes on writing.

    Attributes:
        source: JSON-able, what the writer was given with the batch that holds the next row; None at
            the very start.
        first_row: the number of that batch's first row among the rows of its rank.
        row: the number of the next row; rows before it are dropped when they come again.
    """

    source: Any
    first_row: int
    row: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sidecar:
    """One finished shard.

    Attributes:
        file: the shard's file name.
        rows: how many rows it holds.
        nbytes: its size on disk.
        sha256: of its bytes, as `sha256sum` prints it.
        next: where its rank goes on after it.
        dropped: rows that its rank left out so far because they were not finite.
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
        """The text of the sidecar; document runs are base64 of little-endian integers."""
        content = {name: getattr(self, name) for name in ("file", "rows", "nbytes", "sha256", "dropped")}
        content["next"] = asdict(self.next)
        content["documents"] = {
            "runs": len(self.document_rows),
            "hashes": b64encode(self.document_hashes.astype("<i8").tobytes()).decode(),
            "rows": b64encode(self.document_rows.astype("<i4").tobytes()).decode(),
        }
        return dump_json(content)

    @classmethod
    def parse(cls, data: bytes, where: str) -> Sidecar:
        """Read the text of a sidecar; `where` names it in errors."""
        content = parse_json(data, where)
        try:
            documents = content["documents"]
            sidecar = cls(
                **{name: content[name] for name in ("file", "rows", "nbytes", "sha256", "dropped")},
                next=Resume(**content["next"]),
                document_hashes=np.frombuffer(b64decode(documents["hashes"]), "<i8"),
                document_rows=np.frombuffer(b64decode(documents["rows"]), "<i4"),
            )
            counts = int(sidecar.document_rows.sum()), len(sidecar.document_rows)
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedShardError(f"{where} is no sidecar of a shard: {error!r}") from error
        check_shard_name(sidecar.file, where)
        if counts != (sidecar.rows, len(sidecar.document_hashes)):
            raise DamagedShardError(f"{where} contradicts itself: its documents do not add up to its rows")
        return sidecar


def shard_name(rank: int, number: int) -> str:
    """File name of a rank's shard."""
    return f"rank{rank:05d}-{number:06d}.pt"


def sidecar_name(shard: str) -> str:
    """File name of a shard's sidecar."""
    return shard.removesuffix(".pt") + ".json"


def shard_of(sidecar: str) -> str | None:
    """File name of the shard that a sidecar's name belongs to, or None if it is no sidecar's name."""
    shard = sidecar.removesuffix(".json") + ".pt"
    return shard if sidecar.endswith(".json") and parse_shard_name(shard) else None


def done_name(rank: int) -> str:
    """File name of the mark that a rank has written everything."""
    return f"rank{rank:05d}.done.json"


def parse_shard_name(name: str) -> tuple[int, int] | None:
    """Rank and number in a shard's file name, or None if it is none."""
    match = _SHARD.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


def check_shard_name(name: object, where: str) -> None:
    """Refuse a file name that is not one of ours, such as a path out of the folder."""
    if not isinstance(name, str) or parse_shard_name(name) is None:
        raise DamagedShardError(
            f"{where} names {name!r}, which is not a shard of its own folder (like 'rank00000-000000.pt'): "
            "nothing was read; do not use this cache unless you know who wrote it"
        )


def dump_json(content: Mapping[str, Any]) -> bytes:
    """Readable JSON of a file of ours, with the format's name and version."""
    return (json.dumps({"format": FORMAT, "version": VERSION, **content}, indent=2) + "\n").encode()


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """Read a JSON file of ours.

    Raises:
        ShardError: it is not JSON, not ours, or of a newer version.
    """
    try:
        content = json.loads(data)
    except ValueError as error:
        raise DamagedShardError(
            f"{where} is not valid JSON ({error}): delete it and run `extract` again"
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
    """What differs between two JSON values: dotted name, one value, the other."""
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
