"""Keep local copies of remote shards: fetch ahead, verify checksums, delete the least recently used.

Several processes may use one folder of copies. What they decide, they decide under a lock, from what is on disk, so that
the limit holds for all of them together and for what earlier runs left. A copy's access time is the time of its last
use. A file that is being fetched has its final size in its name and is locked by its owner; without an owner it was
left by a killed process. A copy that another process deletes stays readable for those who have mapped it.

In: a folder and the name of a file in it. Out: a local path to that file.
"""

from __future__ import annotations

import re
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from os import stat_result, utime
from pathlib import Path
from threading import Lock as ThreadLock
from typing import IO

from deeplens_lightning.disk.files import TEMPORARY, announce, make_folder, remove, replace
from deeplens_lightning.disk.locks import TemporaryFolder, create_locked, locked, share, take_over
from deeplens_lightning.options import CACHE_BYTES, TIMEOUT
from deeplens_lightning.shards.checksum import sha256_of
from deeplens_lightning.shards.errors import DamagedShardError, ShardError
from deeplens_lightning.shards.fetch_threads import FetchThreads
from deeplens_lightning.shards.folder import Folder, LocalFolder

_SUBFOLDER = re.compile("[0-9a-f]{16}")
"""Names of the folders that `LocalCopies` makes, one for each remote folder."""
_FINAL_SIZE = re.compile(rf"{re.escape(TEMPORARY)}.*-(\d+)")
_POLL = 0.05
"""Seconds between looks at what another process is fetching or has locked."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A remote file to be copied: its folder, name, size in bytes, checksum if it has one, and the path of the copy."""

    folder: Folder
    name: str
    size: int
    sha256: str | None
    path: Path

    @property
    def where(self) -> str:
        return f"{self.folder.where}/{self.name}"


class LocalCopies:
    """Local copies of remote files, limited to `max_bytes` in all.

    Args:
        directory: where the copies are kept; by default a temporary folder that `close` deletes.
        max_bytes: limit on the copies' size in bytes: of all processes that use `directory`, and of what earlier runs
            left there. The least recently used copy is deleted first.
        timeout: seconds without a byte after which a server is given up.

    Attributes:
        max_bytes: the limit.
        timeout: as given.

    Raises:
        ValueError: `timeout` is not positive.
        OSError: the folder cannot be made.
    """

    def __init__(
        self, directory: Path | None = None, max_bytes: int = CACHE_BYTES, timeout: float = TIMEOUT
    ) -> None:
        if not timeout > 0:
            raise ValueError(f"cache_options.timeout must be above 0 seconds, got {timeout}")
        self.max_bytes, self.timeout = max_bytes, timeout
        self._temporary = None
        if directory is None:
            self._temporary = TemporaryFolder()
            directory = self._temporary.path
        self._directory = directory
        make_folder(directory)
        self._begun = time.time()
        self._threads = FetchThreads(2)
        weakref.finalize(self, self._threads.stop)
        self._closed = False
        self._guard = ThreadLock()
        self._running: dict[Path, Future[None]] = {}
        self._right: dict[Path, tuple[int, int]] = {}  # inode and change of the copies that were compared

    def fetch(self, folder: Folder, name: str, size: int, sha256: str | None) -> None:
        """Start to fetch a file in a background thread, unless it is being fetched.

        Args:
            folder: the folder with the file.
            name: name of the file.
            size: size of the file in bytes. Older copies are deleted until this one fits.
            sha256: checksum of the file; None for a file that has none.

        Raises:
            ShardError: the file alone is larger than `max_bytes`.
        """
        self._start(self._wanted(folder, name, size, sha256))

    @contextmanager
    def opened(self, folder: Folder, name: str, size: int, sha256: str | None) -> Iterator[Path]:
        """A local path of a file, fetched if necessary; no process deletes it in the `with` block.

        Args:
            folder: the folder with the file.
            name: name of the file.
            size: size of the file in bytes.
            sha256: checksum of the file; None for a file that has none.

        Raises:
            DamagedShardError: the file is missing, or was fetched twice and has another size or checksum.
            UnreachableError: the server refuses, fails or does not answer.
            ShardError: the file alone is larger than `max_bytes`.
        """
        wanted = self._wanted(folder, name, size, sha256)
        while True:
            reader = share(wanted.path)
            if reader is not None:
                with reader:
                    if self._is_right(wanted):
                        yield wanted.path
                        return
            future = self._start(wanted)
            try:
                future.result()
            finally:
                with self._guard:
                    self._running.pop(wanted.path, None)

    def close(self) -> None:
        """Wait for the files that are being fetched, and delete the folder of copies if it is a temporary one."""
        self._closed = True
        self._threads.stop()
        self._threads.join()
        if self._temporary is not None:
            self._temporary.close()

    def _wanted(self, folder: Folder, name: str, size: int, sha256: str | None) -> _Wanted:
        if size > self.max_bytes:
            raise ShardError(
                f"{folder.where}/{name} has {size:,} bytes, more than the {self.max_bytes:,} bytes allowed for local "
                "copies of remote shards: raise cache_options.bytes (cache_bytes= of ShardStream)"
            )
        subfolder = blake2b(folder.where.encode(), digest_size=8).hexdigest()
        return _Wanted(folder, name, size, sha256, self._directory / subfolder / name)

    def _start(self, wanted: _Wanted) -> Future[None]:
        with self._guard:
            future = self._running.get(wanted.path)
            if future is None or (future.done() and not future.exception()):
                future = self._running[wanted.path] = self._threads.submit(lambda: self._bring(wanted))
            return future

    def _bring(self, wanted: _Wanted) -> None:
        """Fetch a file, or wait until another process has fetched it, unless there is a right copy."""
        while not (self._closed or self._is_right(wanted)):
            part = self._reserve(wanted)
            if part is None:
                time.sleep(_POLL)
                continue
            with part:
                path = Path(part.name)
                try:
                    self._download(wanted, path)
                    self._right[wanted.path] = _version(path.stat())
                    replace(path, wanted.path)
                finally:
                    remove(path)

    def _is_right(self, wanted: _Wanted) -> bool:
        """Whether there is a copy of the right size and checksum; a right copy counts as used now.

        A copy without a checksum is trusted only if it was made after this object.
        """
        try:
            found = wanted.path.stat()
            if found.st_size != wanted.size:
                return False
            if self._right.get(wanted.path) != _version(found):
                if wanted.sha256 is None and found.st_mtime < self._begun:
                    return False
                if wanted.sha256 is not None and sha256_of(wanted.path) != wanted.sha256:
                    return False
                self._right[wanted.path] = _version(found)
            utime(wanted.path, ns=(time.time_ns(), found.st_mtime_ns))
        except FileNotFoundError:  # another process may delete it
            return False
        return True

    def _reserve(self, wanted: _Wanted) -> IO[bytes] | None:
        """Delete old copies until a file fits, and begin it.

        Returns:
            The empty file, open and locked; None while another process fetches it, or others need all the space.
        """
        part = wanted.path.with_name(f"{TEMPORARY}{wanted.name}-{wanted.size}")
        with locked(self._directory / ".lock"):
            make_folder(wanted.path.parent)
            copies = _on_disk(self._directory, wanted.path)
            used = sum(size for _, size in copies)
            for path, size in copies:
                unfinished = path.name.startswith(TEMPORARY)
                if not unfinished and used + wanted.size <= self.max_bytes:
                    break
                owner = take_over(path)
                if owner is not None:
                    with owner:
                        remove(path)
                        used -= size
            if used + wanted.size > self.max_bytes or part.exists():
                return None
            return create_locked(part)

    def _download(self, wanted: _Wanted, to: Path) -> None:
        """Fetch a file; once more if it arrived with another size or checksum.

        Raises:
            DamagedShardError: it arrived so twice, or is missing.
        """
        for attempt in (1, 2):
            announce("download", to)
            wanted.folder.download(wanted.name, to)
            size = to.stat().st_size
            found = sha256_of(to) if wanted.sha256 is not None else None
            if size == wanted.size and found == wanted.sha256:
                return
            if attempt == 2:
                wrong = (
                    f"is altered: its checksum is {found}, its sidecar says {wanted.sha256}"
                    if size == wanted.size
                    else f"arrived with {size:,} of its {wanted.size:,} bytes, twice"
                )
                raise DamagedShardError(
                    f"{wanted.where} {wrong}. Copy it again from where it was written, or delete it and run the "
                    "command that wrote it again"
                )


def _on_disk(directory: Path, wrong: Path) -> list[tuple[Path, int]]:
    """Paths and sizes in bytes of unfinished files, then of copies: the wrong one, then the least recently used."""
    found: list[tuple[bool, bool, int, Path, int]] = []
    for path in [*directory.glob("*/*"), *directory.glob("rank*/*/*")]:  # the latter by earlier versions
        unfinished = path.name.startswith(TEMPORARY)
        if _SUBFOLDER.fullmatch(path.parent.name) and (unfinished or path.suffix == ".pt"):
            with suppress(FileNotFoundError):  # another process may rename it
                stat, final = path.stat(), _FINAL_SIZE.fullmatch(path.name)
                size = max(stat.st_size, int(final[1])) if final else stat.st_size
                found.append((not unfinished, path != wrong, stat.st_atime_ns, path, size))
    return [(path, size) for *_, path, size in sorted(found)]


def _version(stat: stat_result) -> tuple[int, int]:
    return stat.st_ino, stat.st_mtime_ns


@contextmanager
def local_path(
    folder: Folder, file: str, size: int, sha256: str | None, copies: LocalCopies | None
) -> Iterator[Path]:
    """A local path to a file of a folder, for the `with` block: the file itself, or a copy of a remote one.

    Args:
        folder: the folder with the file.
        file: its name.
        size: its size in bytes.
        sha256: its checksum; None for a file that has none.
        copies: where remote files are copied to; None if all folders are local.

    Raises:
        ShardError: the folder is remote and `copies` is None, or the file is too large for `copies`.
        DamagedShardError: a remote file is missing, or was fetched twice and has another size or checksum.
        UnreachableError: the server refuses, fails or does not answer.
    """
    if isinstance(folder, LocalFolder):
        yield folder.path / file
    elif copies is None:
        raise ShardError(f"{folder.where} is remote and needs local copies: give copies=LocalCopies(...)")
    else:
        with copies.opened(folder, file, size, sha256) as path:
            yield path
