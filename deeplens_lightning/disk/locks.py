"""Locks on files that end with the process that holds them, and temporary folders that are deleted if it was killed.

They are `flock` locks, also between two objects of one process. Windows has none: there a lock is always granted, and
what a killed process left is not deleted.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO

if sys.platform != "win32":
    import fcntl

_PREFIX = "deeplens-lightning-"
_OWNER = ".owner"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for the lock of a file and hold it in the `with` block; the file is created and never deleted."""
    with path.open("ab") as file:
        if sys.platform != "win32":
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def create_locked(path: Path) -> IO[bytes] | None:
    """Create a file unless it exists, and lock it until it is closed; None if another owner has locked it."""
    return _only_owner(path.open("ab"), path)


def take_over(path: Path) -> IO[bytes] | None:
    """Lock a file that exists; None if it has a living owner or a reader, or is gone."""
    try:
        return _only_owner(path.open("rb+"), path)
    except FileNotFoundError:
        return None


def share(path: Path) -> IO[bytes] | None:
    """Keep a file from being taken over until the result is closed; None if it has an owner, or is gone."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    if sys.platform != "win32" and not _granted(file, path, fcntl.LOCK_SH):
        return None
    return file


class TemporaryFolder:
    """A temporary folder, deleted by `close`, with this object, or at a later start if the process was killed.

    Attributes:
        path: the folder.
    """

    def __init__(self) -> None:
        _delete_abandoned()
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
            with suppress(FileNotFoundError):  # another process took the folder for one left behind
                owner = create_locked(self.path / _OWNER)
                if owner is not None:
                    break
        self._delete = weakref.finalize(self, _delete, self.path, owner, os.getpid())

    def close(self) -> None:
        """Delete the folder."""
        self._delete()


@cache
def _delete_abandoned() -> None:
    """Delete the temporary folders of killed processes; once in a process."""
    if sys.platform == "win32":
        return
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(PermissionError, NotADirectoryError):  # another user's
            owner = take_over(folder / _OWNER)
            if owner is not None:
                _delete(folder, owner, os.getpid())


def _delete(folder: Path, owner: IO[bytes], process: int) -> None:
    if os.getpid() == process:  # not in a fork
        shutil.rmtree(folder, ignore_errors=True)
    owner.close()


def _only_owner(file: IO[bytes], path: Path) -> IO[bytes] | None:
    return file if sys.platform == "win32" or _granted(file, path, fcntl.LOCK_EX) else None


def _granted(file: IO[bytes], path: Path, kind: int) -> bool:
    """Lock an open file without waiting, if `path` still names it; else close it."""
    if sys.platform != "win32":
        with suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return True
    file.close()
    return False
