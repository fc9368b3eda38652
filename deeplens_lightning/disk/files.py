"""Change files and folders, one announced step after another, so that a test can end the process at any of them.

Every change that the package makes to a disk or an object store goes through this module. `watch` sets a function that is
called before each step and half way through each write. `write_whole` is for files that must be whole under their name.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

TEMPORARY = ".writing-"
"""Prefix of the names of unfinished files. Readers ignore these files."""
BUFFER = 2**18
"""Bytes that are collected before they are written to a file."""

Watcher = Callable[[str, str], None]
_watchers: list[Watcher] = []


def watch(watcher: Watcher | None) -> None:
    """Call `watcher(step, path)` before every step of this process from now on; None to call nothing, as at first.

    The steps are `create`, `append`, `write`, `inside write` (half of the bytes are written), `sync`, `replace`,
    `remove`, `truncate`, `make folder`, `sync folder`, `download` and `upload`.
    """
    _watchers[:] = [] if watcher is None else [watcher]


def announce(step: str, path: str | os.PathLike[str]) -> None:
    """Tell the watcher of `watch` which step comes next."""
    for watcher in _watchers:
        watcher(step, os.fspath(path))


def create(path: Path) -> BinaryIO:
    """Open a new file for writing; an older one of that name is emptied."""
    announce("create", path)
    return io.BufferedWriter(_AnnouncedFile(path, "w"), BUFFER)


def append_to(path: Path) -> BinaryIO:
    """Open a file to write at its end; it is created if it does not exist."""
    announce("append", path)
    return io.BufferedWriter(_AnnouncedFile(path, "a"), BUFFER)


def sync(file: BinaryIO) -> None:
    """Write what is buffered, and wait until the content of the file is on the disk."""
    file.flush()
    announce("sync", file.name)
    os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Wait until the content of a file, which another function has written, is on the disk."""
    with path.open("rb+") as file:
        sync(file)


def truncate(path: Path, size: int) -> None:
    """Shorten a file to a number of bytes."""
    announce("truncate", path)
    os.truncate(path, size)


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk, where the operating system can do that for a folder."""
    if os.name != "posix":
        return
    announce("sync folder", path)
    with suppress(PermissionError):  # a folder that may be changed but not listed cannot be opened
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def replace(source: Path, target: Path) -> None:
    """Rename a file or folder, replacing a file of the new name, and wait until the new name is on the disk."""
    announce("replace", target)
    source.replace(target)
    sync_folder(target.parent)


def remove(path: Path) -> None:
    """Delete a file if it exists, and wait until its name is gone from the disk."""
    if os.path.lexists(path):
        announce("remove", path)
        path.unlink(missing_ok=True)
        sync_folder(path.parent)


def remove_folder(path: Path) -> None:
    """Delete a folder with all that is in it."""
    announce("remove", path)
    shutil.rmtree(path)


def make_folder(path: Path) -> None:
    """Create a folder and its parents where they do not exist, and wait until their names are on the disk."""
    if not path.is_dir():
        make_folder(path.parent)
        announce("make folder", path)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def upload(system: Any, source: Path, target: str) -> None:
    """Copy a local file to a path of an fsspec file system."""
    announce("upload", target)
    system.put_file(str(source), target)


def write_whole(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file so that readers see all of it or nothing, also after a kill or a loss of power.

    Missing folders are created. A path that is no regular file, such as `/dev/stdout`, is written to as it is.

    Args:
        path: the file.
        content: its bytes, or a function that writes them to an open file.
    """
    make_folder(path.parent)
    special = path.exists() and not path.is_file()
    unfinished = path if special else path.with_name(f"{TEMPORARY}{path.name}")
    try:
        with create(unfinished) as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
            if not special:
                sync(file)
        if not special:
            replace(unfinished, path)
    finally:
        if not special:
            remove(unfinished)


class _AnnouncedFile(io.FileIO):
    """An open file that announces every write to the operating system."""

    def write(self, data: Any, /) -> int:
        announce("write", self.name)
        if not _watchers:
            return super().write(data)
        half = len(data) // 2
        written = super().write(data[:half])
        announce("inside write", self.name)
        return written + super().write(data[half:])
