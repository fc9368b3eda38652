"""Folders of a cache: list files, read small files, write files that appear whole or not at all.

`Folder` is the protocol, `LocalFolder` a folder on this machine's file systems. `remote.py` has the folder behind
a URL; `open_folder.py` chooses between the two.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from deeplens_lightning.disk.mistakes import naming
from deeplens_lightning.shards.errors import DamagedShardError, ShardError

if sys.platform != "win32":
    import fcntl

TEMPORARY = ".writing-"
"""Prefix of the names of unfinished files. Readers ignore these files."""


class Folder(Protocol):
    """A folder that holds a cache.

    Attributes:
        where: its path or URL, for messages.
    """

    where: str

    def sizes(self) -> dict[str, int]:
        """Bytes by file name, sorted, without unfinished files; empty if the folder does not exist."""
        ...

    def read(self, name: str) -> bytes:
        """The content of one small file.

        Raises:
            DamagedShardError: the file does not exist.
        """
        ...

    def read_many(self, names: Sequence[str]) -> list[bytes]:
        """The contents of several small files, in the order of `names`.

        Raises:
            DamagedShardError: a file does not exist.
        """
        ...

    def write(self, name: str, content: bytes) -> None:
        """Write a small file so that readers see all of it or nothing."""
        ...

    def stage(self, name: str) -> Path:
        """A local path to write the file `name` to, before `publish`."""
        ...

    def publish(self, staged: Path, name: str) -> None:
        """Move a staged file to its final name, replacing a file of that name."""
        ...

    def remove(self, name: str) -> None:
        """Delete a file if it exists."""
        ...

    def clean(self, prefix: str) -> None:
        """Delete unfinished files whose final names begin with `prefix`."""
        ...

    def lock(self, name: str) -> Lock:
        """Lock the folder against other writers, where the file system has locks.

        Args:
            name: name of the lock.

        Raises:
            ShardError: another process holds the lock.
        """
        ...

    def free_bytes(self) -> int | None:
        """Free space in bytes; None if it is not known."""
        ...

    def download(self, name: str, to: Path) -> None:
        """Copy a file to a local path."""
        ...


class Lock(Protocol):
    """A lock that keeps other writers out until it is released or this process ends."""

    def release(self) -> None:
        """Release the lock."""
        ...


class LocalFolder:
    """A folder on a local or network-mounted file system.

    Args:
        where: its path; a `file://` prefix and `~` are understood.

    Attributes:
        path: the folder's path.
        where: the same as a string.
    """

    def __init__(self, where: str | os.PathLike[str]) -> None:
        self.path = Path(str(where).removeprefix("file://")).expanduser()
        self.where = str(self.path)

    def sizes(self) -> dict[str, int]:
        """Bytes by file name, sorted, without unfinished files; empty if the folder does not exist."""
        try:
            entries = list(os.scandir(self.path))
        except FileNotFoundError:
            return {}
        return {
            entry.name: entry.stat().st_size
            for entry in sorted(entries, key=lambda entry: entry.name)
            if entry.is_file() and not entry.name.startswith(".")
        }

    def read(self, name: str) -> bytes:
        """The content of one small file.

        Raises:
            DamagedShardError: the file does not exist.
        """
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError as error:
            raise DamagedShardError(f"{self.path / name} is missing") from error

    def read_many(self, names: Sequence[str]) -> list[bytes]:
        """The contents of several small files, in the order of `names`."""
        return [self.read(name) for name in names]

    def write(self, name: str, content: bytes) -> None:
        """Write a small file so that readers see all of it or nothing."""
        staged = self.stage(f"{name}-{uuid4().hex}")  # several ranks may write the same manifest at once
        try:
            with naming(self.path / name):
                staged.write_bytes(content)
            self.publish(staged, name)
        finally:
            staged.unlink(missing_ok=True)

    def stage(self, name: str) -> Path:
        """A path in the same folder (a rename must not cross file systems) that readers ignore."""
        self.path.mkdir(parents=True, exist_ok=True)
        return self.path / f"{TEMPORARY}{name}"

    def publish(self, staged: Path, name: str) -> None:
        """Flush the staged file to the disk, rename it, then flush the rename."""
        with staged.open("rb+") as file, naming(self.path / name):
            os.fsync(file.fileno())
        staged.replace(self.path / name)
        if os.name == "posix":
            directory = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)

    def remove(self, name: str) -> None:
        """Delete a file if it exists."""
        (self.path / name).unlink(missing_ok=True)

    def clean(self, prefix: str) -> None:
        """Delete unfinished files whose final names begin with `prefix`."""
        for path in self.path.glob(f"{TEMPORARY}{prefix}*"):
            path.unlink(missing_ok=True)

    def lock(self, name: str) -> Lock:
        """Lock the folder against other writers on this file system.

        Args:
            name: name of the lock's file.

        Raises:
            ShardError: another process holds the lock.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        return FileLock(self.path / name)

    def free_bytes(self) -> int | None:
        """Free space for an ordinary user in bytes; None where the file system does not report it."""
        path = next(path for path in (self.path.absolute(), *self.path.absolute().parents) if path.exists())
        try:
            return shutil.disk_usage(path).free
        except OSError:  # some network mounts refuse
            return None

    def download(self, name: str, to: Path) -> None:
        """Copy a file to a local path."""
        shutil.copyfile(self.path / name, to)


class FileLock:
    """An exclusive `flock` on a file, held until `release` or until the process ends.

    Windows has no `flock`: there nothing is locked, and the writer notices a second writer by its sidecars.

    Args:
        path: the lock's file, created if it does not exist.

    Raises:
        ShardError: another process holds the lock.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")
        if sys.platform != "win32":
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                self._file.close()
                raise ShardError(
                    f"another process is writing to {path.parent}: wait for it, stop it, or choose another folder"
                ) from error

    def release(self) -> None:
        """Release the lock."""
        self._file.close()
