"""SHA-256 checksums of files: of files on disk, and of shards while they are written."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from deeplens_lightning.disk.files import create


def sha256_of(path: Path) -> str:
    """SHA-256 of a local file, in hexadecimal as `sha256sum` prints it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def save_hashed(content: Mapping[str, Any], path: Path) -> tuple[int, str]:
    """Write `content` to a local path with `torch.save` and compute the checksum on the way.

    Returns:
        The file's size in bytes and its SHA-256 in hexadecimal.

    Raises:
        OSError: the file cannot be written (disk full, for example). `torch.save` alone would raise a
            RuntimeError without the reason.
    """
    with create(path) as file:
        hashing = _HashingFile(file)
        try:
            torch.save(content, hashing)  # type: ignore[arg-type]
        except RuntimeError as error:
            if hashing.error is not None:
                raise hashing.error from error
            raise
    return hashing.size, hashing.digest.hexdigest()


class _HashingFile:
    """Pass writes on to a file, hash the bytes, and keep the first error that writing raised."""

    def __init__(self, file: BinaryIO) -> None:
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
