"""Saving a shard with its checksum, and closing a cache with its index."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from deeplens_lightning.shards.folder import Folder
from deeplens_lightning.shards.format import (
    INDEX,
    Sidecar,
    check_shard_name,
    done_name,
    dump_json,
    parse_json,
    shard_name,
    sidecar_name,
)


def save_hashed(content: Mapping[str, Any], path: Path) -> tuple[int, str]:
    """`torch.save` to a local path; the file's size and SHA-256, taken while writing.

    Raises:
        OSError: of the writing itself, which torch alone would hide behind a RuntimeError.
    """
    with path.open("wb") as file:
        hashing = _HashingFile(file)
        try:
            torch.save(content, hashing)  # type: ignore[arg-type]
        except RuntimeError as error:
            if hashing.error is not None:
                raise hashing.error from error
            raise
    return hashing.size, hashing.digest.hexdigest()


def sha256_of(path: Path) -> str:
    """SHA-256 of a local file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def write_index(folder: Folder, world_size: int) -> bool:
    """Write `index.json` if every rank is done; whether that was so.

    Every rank tries when it finishes, so the last one succeeds and nobody waits for anybody.
    """
    sizes = folder.sizes()
    if not all(done_name(rank) in sizes for rank in range(world_size)):
        return False
    shards = []
    for rank in range(world_size):
        mark = parse_json(folder.read(done_name(rank)), f"{folder.where}/{done_name(rank)}")
        for number in range(mark["shards"]):
            name = sidecar_name(shard_name(rank, number))
            sidecar = Sidecar.parse(folder.read(name), f"{folder.where}/{name}")
            shards.append({key: getattr(sidecar, key) for key in ("file", "rows", "nbytes", "sha256")})
    totals = {key: sum(shard[key] for shard in shards) for key in ("rows", "nbytes")}
    folder.write(INDEX, dump_json({**totals, "shards": shards}))
    return True


def read_index(folder: Folder) -> list[dict[str, Any]]:
    """The shards that `index.json` lists: file, rows, bytes, sha256."""
    where = f"{folder.where}/{INDEX}"
    shards: list[dict[str, Any]] = parse_json(folder.read(INDEX), where)["shards"]
    for shard in shards:
        check_shard_name(shard["file"], where)
    return shards


def is_whole(folder: Folder, sizes: Mapping[str, int]) -> bool:
    """Whether every shard of the index is there in its size, with its sidecar."""
    return all(
        sizes.get(shard["file"]) == shard["nbytes"] and sidecar_name(shard["file"]) in sizes
        for shard in read_index(folder)
    )


class _HashingFile:
    """A file that hashes what is written to it and remembers the first error."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: memoryview) -> int:
        try:
            self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        self.digest.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()
