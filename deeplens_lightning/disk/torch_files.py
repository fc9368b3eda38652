"""Compare the content of files that `torch.save` wrote with the CRCs that it wrote beside; `torch.load` does not.

Such a file is a zip without compression, with one entry for each storage of numbers, and a CRC of each entry.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

UNREADABLE = (
    zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, RuntimeError, ValueError, EOFError, LookupError,
    OverflowError, MemoryError,
)  # fmt: skip
"""All that `zipfile` raises on bytes that are not a zip."""
_PICKLE = b"\x80"  # the first byte of a file in torch's format before 1.6
_HEADER = 30  # bytes of a local header in a zip, before the name
_PIECE = 2**20
_DESCRIPTORS = {0, 12, 16, 20, 24}
"""Bytes that may follow the content of an entry: its CRC and sizes, of 32 or 64 bits, with or without a signature."""


class DamagedFileError(ValueError):
    """A file is not as `torch.save` wrote it."""


def check_crcs(path: Path, wanted: Callable[[str], bool] = lambda _name: True) -> None:
    """Compare entries of a file that `torch.save` wrote with their CRCs, and the directory with the size of the file.

    Args:
        path: a local file.
        wanted: whether to read the entry of a name; default all.

    Raises:
        DamagedFileError: one differs, or the file is not such a zip; the message is the reason alone.
        OSError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _check_directory(path, entries, archive.start_dir)
            for entry in entries:
                if wanted(entry.filename):
                    with archive.open(entry) as file:
                        while file.read(_PIECE):
                            pass
    except UNREADABLE as error:
        raise DamagedFileError(str(error)) from error


def check_checkpoint_file(path: str | Path | None) -> None:
    """Read a checkpoint of Lightning once and compare it with its CRCs, before it is loaded or trained on.

    Nothing is checked of a URL, of a folder (strategies with parts of the weights on each rank), and of a file in torch's
    format before 1.6, which has no CRCs.

    Args:
        path: the checkpoint; None for none.

    Raises:
        DamagedFileError: it is damaged; the message names the file and what to do.
    """
    if path is None or not Path(path).is_file():
        return
    with Path(path).open("rb") as file:
        if file.read(1) == _PICKLE:
            return
    try:
        check_crcs(Path(path))
    except DamagedFileError as error:
        raise DamagedFileError(
            f"{path} is damaged: {error}. Copy it again, or take another one: --ckpt_path newest:FOLDER finds the newest "
            "intact checkpoint (if it was saved under torch.serialization.set_crc32_options(False), load it and "
            "torch.save it again)"
        ) from error


def starts(path: Path, entries: list[zipfile.ZipInfo]) -> list[int]:
    """Offset in bytes of the content of each entry, which its local header decides."""
    found = []
    with path.open("rb") as file:
        for entry in entries:
            file.seek(entry.header_offset + _HEADER - 4)
            name, extra = struct.unpack("<HH", file.read(4))
            found.append(entry.header_offset + _HEADER + name + extra)
    return found


def _check_directory(path: Path, entries: list[zipfile.ZipInfo], directory: int) -> None:
    """Check that the entries of a zip are not compressed, differ in name, and fill the file up to its directory."""
    stored = all(
        entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
        for entry in entries
    )
    entries = sorted(entries, key=lambda entry: entry.header_offset)
    following = [*(entry.header_offset for entry in entries[1:]), directory]
    gaps = {
        after - start - entry.file_size
        for start, entry, after in zip(starts(path, entries), entries, following, strict=True)
    }
    names = {entry.filename for entry in entries}
    if not stored or len(names) < len(entries) or not gaps <= _DESCRIPTORS:
        raise zipfile.BadZipFile("its directory is not one that torch.save writes")
