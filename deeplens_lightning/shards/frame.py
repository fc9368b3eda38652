"""The bytes of a torch file outside its numbers: compute and compare their checksum; check the CRCs of the others.

A file that `torch.save` wrote is a zip with one entry for each storage of numbers, the payload. All other bytes, its
frame, are a few kilobytes: headers, the pickled shapes and offsets, and the directory with a CRC of each entry. Reading
these bytes alone finds all damage outside a payload.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deeplens_lightning.disk import torch_files
from deeplens_lightning.disk.records import Count, Digest
from deeplens_lightning.disk.torch_files import UNREADABLE, DamagedFileError, starts
from deeplens_lightning.shards.errors import DamagedShardError, ShardError

_STORAGE = re.compile(r"[^/]+/data/[0-9]+")
_PIECE = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """The bytes of a shard outside its payloads.

    Attributes:
        payloads: offset and length in bytes of each payload, in the order of the file.
        sha256: checksum of all other bytes.

    Raises:
        ShardError: payloads overlap.
    """

    payloads: tuple[tuple[Count, Count], ...]
    sha256: Digest

    def __post_init__(self) -> None:
        end = 0
        for offset, length in self.payloads:
            if offset < end:
                raise ShardError("payloads overlap or are not in order")
            end = offset + length


def read_frame(path: Path) -> Frame:
    """The frame of a file that `torch.save` wrote.

    Raises:
        DamagedShardError: the file is not such a zip.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if _STORAGE.fullmatch(entry.filename)]
        offsets = starts(path, entries)
    except UNREADABLE as error:
        raise DamagedShardError(f"{path} is not a file that torch.save wrote: {error}") from error
    payloads = [(start, entry.file_size) for start, entry in zip(offsets, entries, strict=True)]
    found = tuple(sorted(payloads))
    return Frame(payloads=found, sha256=_outside(path, found))


def check_frame(path: Path, frame: Frame, where: str, fix: str) -> None:
    """Compare the bytes of a shard outside its payloads with their checksum.

    Args:
        path: path of the local file.
        frame: the frame that it was written with.
        where: path or URL of the shard, for messages.
        fix: what to do if it differs, for messages.

    Raises:
        DamagedShardError: it differs.
    """
    if _outside(path, frame.payloads) != frame.sha256:
        raise DamagedShardError(f"{where} is altered outside its numbers, or is another shard. {fix}")


def check_crcs(path: Path, where: str) -> None:
    """Compare every entry of a file that `torch.save` wrote with its CRC.

    Raises:
        DamagedShardError: one differs, or the file is not such a zip.
    """
    _check_zip(path, where, lambda _name: True)


def check_frame_crcs(path: Path, where: str) -> None:
    """Compare every entry but the payloads of a file that `torch.save` wrote with its CRC, which reads a few kilobytes.

    Raises:
        DamagedShardError: one differs, or the file is not such a zip.
    """
    _check_zip(path, where, lambda name: _STORAGE.fullmatch(name) is None)


def _check_zip(path: Path, where: str, wanted: Callable[[str], bool]) -> None:
    try:
        torch_files.check_crcs(path, wanted)
    except DamagedFileError as error:
        raise DamagedShardError(
            f"{where} is altered: {error}. Copy it again; if it was saved under "
            "torch.serialization.set_crc32_options(False), load it and torch.save it again"
        ) from error


def _outside(path: Path, payloads: tuple[tuple[int, int], ...]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        at = 0
        for offset, length in payloads:
            digest.update(file.read(offset - at))
            at = file.seek(offset + length)
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()
