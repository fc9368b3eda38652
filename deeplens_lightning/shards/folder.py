"""Folders of a cache: list files, read small files, write files that appear whole or not at all.

`Folder` is the protocol, `LocalFolder` a folder on this machine's file systems. `remote.py` has the folder behind
a URL; `open_folder.py` chooses between the two.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from deeplens_lightning.disk.files import (
    TEMPORARY,
    append_to,
    create,
    make_folder,
    remove,
    replace,
    sync,
    sync_file,
)
from deeplens_lightning.disk.mistakes import naming
from deeplens_lightning.shards.errors import DamagedShardError, ShardError

if sys.platform != "win32":
    import fcntl


class Folder(Protocol):
    """A folder that holds a cache.

    Attributes:
        where: its path or URL, for messages.
    """

    where: str

    def create(self) -> None:
        """Create the folder if it does not exist. No other method does, so that a folder that vanished is noticed."""
        ...

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

    def clean(self) -> None:
        """Delete the unfinished files that an earlier process of the same owner left."""
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
        owner: name of the writer, which unfinished files bear; one process at a time writes as this owner.

    Attributes:
        path: the folder's path.
        where: the same as a string.
    """

    def __init__(self, where: str | os.PathLike[str], owner: str = "") -> None:
        self.path = Path(str(where).removeprefix("file://")).expanduser()
        self.where = str(self.path)
        self._owner = owner

    def create(self) -> None:
        """Create the folder and its parents if they do not exist."""
        make_folder(self.path)

    def sizes(self) -> dict[str, int]:
        """Bytes by file name, sorted, without unfinished files; empty if the folder does not exist."""
        try:
            entries = list(os.scandir(self.path))
        except FileNotFoundError:
            return {}
        sizes: dict[str, int] = {}
        for entry in sorted(entries, key=lambda entry: entry.name):
            if not entry.name.startswith(".") and _is_file(entry):
                with suppress(FileNotFoundError):  # another rank has just deleted its incomplete shard
                    sizes[entry.name] = entry.stat().st_size
        return sizes

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
            with naming(self.path / name), create(staged) as file:
                file.write(content)
                sync(file)
            replace(staged, self.path / name)
        finally:
            remove(staged)

    def stage(self, name: str) -> Path:
        """A path in the same folder (a rename must not cross file systems) that readers ignore."""
        return self.path / unfinished_name(self._owner, name)

    def publish(self, staged: Path, name: str) -> None:
        """Flush the staged file to the disk, rename it, then flush the rename."""
        with naming(self.path / name):
            sync_file(staged)
            replace(staged, self.path / name)

    def remove(self, name: str) -> None:
        """Delete a file if it exists."""
        remove(self.path / name)

    def clean(self) -> None:
        """Delete the unfinished files that an earlier process of the same owner left."""
        for path in self.path.glob(f"{TEMPORARY}{self._owner}*"):
            remove(path)

    def lock(self, name: str) -> Lock:
        """Lock the folder against other writers on this file system.

        Args:
            name: name of the lock's file.

        Raises:
            ShardError: another process holds the lock.
        """
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
        self._file = append_to(path)
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


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Whether an entry of a folder is a file; not for a link to itself, of which the system cannot tell."""
    try:
        return entry.is_file()
    except OSError:
        return False


def unfinished_name(owner: str, name: str) -> str:
    """Name of the unfinished file that becomes `name`; it begins with the name of its owner."""
    return f"{TEMPORARY}{name}" if name.startswith(owner) else f"{TEMPORARY}{owner}-{name}"
