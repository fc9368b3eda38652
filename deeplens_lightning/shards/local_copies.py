"""Keep local copies of remote shards: fetch ahead, verify checksums, delete the least recently used.

Copies that an earlier run left in the folder count as the oldest. They are used again if their checksum is right.

In: a folder and the name of a file in it. Out: a local path to that file.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from threading import Lock as ThreadLock
from uuid import uuid4

from deeplens_lightning.disk.files import TEMPORARY, announce, make_folder, remove, replace
from deeplens_lightning.options import CACHE_BYTES
from deeplens_lightning.shards.checksum import sha256_of
from deeplens_lightning.shards.errors import DamagedShardError, ShardError
from deeplens_lightning.shards.folder import Folder, LocalFolder

_SUBFOLDER = re.compile("[0-9a-f]{16}")
UNFINISHED_SECONDS = 3600
"""Seconds since its last change after which an unfinished file is taken for one that was left behind."""
"""Names of the folders that `LocalCopies` makes, one for each remote folder."""


class LocalCopies:
    """Local copies of remote files, limited to `max_bytes` in all.

    Args:
        directory: where the copies are kept; by default a temporary folder that `close` deletes.
        max_bytes: limit on the copies' size in bytes, those of earlier runs included; the least recently used copy is
            deleted first.

    Attributes:
        max_bytes: the limit.
    """

    def __init__(self, directory: Path | None = None, max_bytes: int = CACHE_BYTES) -> None:
        self.max_bytes = max_bytes
        self._delete: Callable[[], object] | None = None
        if directory is None:
            directory = Path(tempfile.mkdtemp(prefix="deeplens-lightning-"))
            self._delete = weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True)
        self._directory = directory
        make_folder(self._directory)
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="shard-fetch")
        weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)
        self._guard = ThreadLock()
        self._files: OrderedDict[Path, tuple[int, Future[None] | None]] = OrderedDict(
            (path, (size, None)) for path, size in _left_over(directory)
        )

    def fetch(self, folder: Folder, name: str, size: int, sha256: str | None) -> None:
        """Start to fetch a file in a background thread, unless there is a copy or one is being fetched.

        Args:
            folder: the folder with the file.
            name: name of the file.
            size: size of the file in bytes. Older copies are deleted until this one fits.
            sha256: checksum of the file; None for a file that has none.

        Raises:
            ShardError: the file alone is larger than `max_bytes`.
        """
        if size > self.max_bytes:
            raise ShardError(
                f"{folder.where}/{name} has {size:,} bytes, more than the {self.max_bytes:,} bytes allowed for local "
                "copies of remote shards: raise cache_options.bytes (cache_bytes= of ShardStream)"
            )
        path = self._path(folder, name)
        with self._guard:
            known = self._files.pop(path, None)
            if known is not None and known[1] is not None:
                self._files[path] = known
                return
            while sum(known for known, _ in self._files.values()) + size > self.max_bytes:
                old, (_, future) = self._files.popitem(last=False)
                if future is not None:
                    future.cancel()
                    with suppress(Exception):  # `get` raises the error to the caller who needs the file
                        future.cancelled() or future.result()
                remove(old)
            self._files[path] = size, self._pool.submit(_download, folder, name, path, sha256)

    def get(self, folder: Folder, name: str, size: int, sha256: str | None) -> Path:
        """The local path of a file, after waiting until it is fetched; arguments as for `fetch`.

        Raises:
            DamagedShardError: the file is missing, or the copy has another checksum.
            ShardError: the file alone is larger than `max_bytes`.
        """
        path = self._path(folder, name)
        while True:
            self.fetch(folder, name, size, sha256)
            _, future = self._files[path]
            try:
                assert future is not None  # `fetch` has set it
                future.result()
            except BaseException:
                with self._guard:
                    self._files.pop(path, None)
                raise
            if path.exists():
                return path
            with self._guard:  # another object with the same folder deleted it: fetch it again
                self._files.pop(path, None)

    def close(self) -> None:
        """Stop fetching, and delete the folder of copies if it is a temporary one."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._delete is not None:
            self._delete()

    def _path(self, folder: Folder, name: str) -> Path:
        return self._directory / blake2b(folder.where.encode(), digest_size=8).hexdigest() / name


def _left_over(directory: Path) -> list[tuple[Path, int]]:
    """Paths and sizes of the files that earlier objects left in their folder, the oldest first."""
    found = []
    for path in directory.glob("*/*"):
        ours = path.suffix == ".pt" or path.name.startswith(TEMPORARY)
        if ours and _SUBFOLDER.fullmatch(path.parent.name):
            with suppress(FileNotFoundError):  # another process may delete it
                stat = path.stat()
                if path.suffix == ".pt" or time.time() - stat.st_mtime > UNFINISHED_SECONDS:
                    found.append((path, stat))
    return [(path, stat.st_size) for path, stat in sorted(found, key=lambda each: each[1].st_mtime_ns)]


def local_path(folder: Folder, file: str, size: int, sha256: str | None, copies: LocalCopies | None) -> Path:
    """A local path to a file of a folder: the file itself, or a copy of a remote one.

    Args:
        folder: the folder with the file.
        file: its name.
        size: its size in bytes.
        sha256: its checksum; None for a file that has none.
        copies: where remote files are copied to; None if all folders are local.

    Raises:
        ShardError: the folder is remote and `copies` is None, or the file is too large for `copies`.
        DamagedShardError: a remote file is missing, or the copy has another checksum.
    """
    if isinstance(folder, LocalFolder):
        return folder.path / file
    if copies is None:
        raise ShardError(f"{folder.where} is remote and needs local copies: give copies=LocalCopies(...)")
    return copies.get(folder, file, size, sha256)


def _download(folder: Folder, name: str, path: Path, sha256: str | None) -> None:
    if path.exists() and sha256 is not None and sha256_of(path) == sha256:
        return  # an earlier run with the same `directory` fetched it
    make_folder(path.parent)
    part = path.with_name(f"{TEMPORARY}{path.name}-{uuid4().hex}")
    try:
        announce("download", part)
        folder.download(name, part)
        if sha256 is not None and (found := sha256_of(part)) != sha256:
            raise DamagedShardError(
                f"{folder.where}/{name} is altered: its checksum is {found}, its sidecar says {sha256}. "
                "Copy it again from where it was written, or delete it and run the extract command again"
            )
        replace(part, path)
    finally:
        remove(part)
