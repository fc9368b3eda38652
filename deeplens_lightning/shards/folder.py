"""A folder of a cache: listing, reading small files, and files that appear whole or not at all.

`open_folder` takes a path or any fsspec URL; `remote.py` has the class for URLs.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from deeplens_lightning.shards.errors import DamagedShardError, ShardError

TEMPORARY = ".writing-"
"""Names of unfinished files begin with this; nothing reads them."""


class Folder(Protocol):
    """Where a cache lies."""

    where: str

    def sizes(self) -> dict[str, int]:
        """Bytes by file name, unfinished files left out; empty when the folder is missing."""
        ...

    def read(self, name: str) -> bytes:
        """A small file's content."""
        ...

    def read_many(self, names: Sequence[str]) -> list[bytes]:
        """Several small files' contents, in the order of `names`."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Put a small file in place at once."""
        ...

    def stage(self, name: str) -> Path:
        """A local path to write the file `name` to, before `publish`."""
        ...

    def publish(self, staged: Path, name: str) -> None:
        """Put a staged file in place at once, replacing what was there."""
        ...

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""
        ...

    def clean(self, prefix: str) -> None:
        """Delete unfinished files whose names begin with `prefix`."""
        ...

    def lock(self, name: str) -> Lock:
        """Keep other writers out until the lock is released or this process ends."""
        ...

    def free_bytes(self) -> int | None:
        """Room left, where that can be known."""
        ...

    @property
    def path(self) -> Path | None:
        """The folder itself where it is local."""
        ...

    def download(self, name: str, to: Path) -> None:
        """Copy a file to a local path."""
        ...


class Lock(Protocol):
    """A writer's claim on a folder."""

    def release(self) -> None:
        """Let others write."""
        ...


def open_folder(where: str | os.PathLike[str]) -> Folder:
    """The folder at a local path or an fsspec URL."""
    from deeplens_lightning.shards.remote import RemoteFolder, is_remote

    return RemoteFolder(str(where)) if is_remote(str(where)) else LocalFolder(where)


class LocalFolder:
    """A folder of a local (or network-mounted) file system."""

    def __init__(self, where: str | os.PathLike[str]) -> None:
        self._path = Path(str(where).removeprefix("file://")).expanduser()
        self.where = str(self._path)

    @property
    def path(self) -> Path:
        """The folder itself."""
        return self._path

    def sizes(self) -> dict[str, int]:
        """Bytes by file name."""
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
        """A small file's content."""
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError as error:
            raise DamagedShardError(f"{self.path / name} is missing") from error

    def read_many(self, names: Sequence[str]) -> list[bytes]:
        """Several small files' contents."""
        return [self.read(name) for name in names]

    def write(self, name: str, content: bytes) -> None:
        """Put a small file in place at once."""
        staged = self.stage(f"{name}-{uuid4().hex}")  # ranks may put the same manifest in place at once
        try:
            staged.write_bytes(content)
            self.publish(staged, name)
        finally:
            staged.unlink(missing_ok=True)

    def stage(self, name: str) -> Path:
        """A name in the same folder (the rename must not cross file systems) that no reader lists."""
        self.path.mkdir(parents=True, exist_ok=True)
        return self.path / f"{TEMPORARY}{name}"

    def publish(self, staged: Path, name: str) -> None:
        """Flush the file to the disk, then rename it, then flush the rename."""
        with staged.open("rb+") as file:
            os.fsync(file.fileno())
        staged.replace(self.path / name)
        if os.name == "posix":
            directory = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""
        (self.path / name).unlink(missing_ok=True)

    def clean(self, prefix: str) -> None:
        """Delete unfinished files whose names begin with `prefix`."""
        for path in self.path.glob(f"{TEMPORARY}{prefix}*"):
            path.unlink(missing_ok=True)

    def lock(self, name: str) -> Lock:
        """An exclusive `flock`, which the kernel drops when the process dies."""
        self.path.mkdir(parents=True, exist_ok=True)
        return FileLock(self.path / name)

    def free_bytes(self) -> int | None:
        """Room left on the file system for an ordinary user."""
        path = next(path for path in (self.path.absolute(), *self.path.absolute().parents) if path.exists())
        try:
            state = os.statvfs(path)
        except (AttributeError, OSError):  # no statvfs on Windows; some network mounts refuse it
            return None
        return state.f_bavail * state.f_frsize

    def download(self, name: str, to: Path) -> None:
        """Copy a file to a local path."""
        shutil.copyfile(self.path / name, to)


class FileLock:
    """An exclusive lock on a file of its own, held while this object lives."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")
        try:
            import fcntl

            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows: the writer's check for unexpected sidecars remains
            pass
        except BlockingIOError as error:
            self._file.close()
            raise ShardError(
                f"another process is writing to {path.parent}: wait for it, stop it, or choose another folder"
            ) from error

    def release(self) -> None:
        """Let others write."""
        self._file.close()
