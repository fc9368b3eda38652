"""Caches behind an fsspec URL: finished shards are uploaded, and fetched into a bounded local folder.

Writing stages a shard locally and uploads it when it is whole. Reading goes through `LocalCopies`,
which fetches ahead, checks what arrives, and deletes what was used longest ago.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from threading import Lock as ThreadLock
from uuid import uuid4

import fsspec

from deeplens_lightning.options import CACHE_BYTES
from deeplens_lightning.shards.errors import DamagedShardError, ShardError
from deeplens_lightning.shards.folder import TEMPORARY, Folder, Lock
from deeplens_lightning.shards.save import sha256_of

_WHOLE_OR_NOTHING = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf"}
"""Object stores, where an upload is seen only when it is complete; elsewhere we upload and rename."""


def is_remote(where: str) -> bool:
    """Whether a source is a URL of something else than the local disk."""
    return "://" in where and not where.startswith(("file://", "local://"))


class RemoteFolder:
    """A folder at an fsspec URL."""

    path = None

    def __init__(self, where: str) -> None:
        self.where = where.rstrip("/")
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.where)
        except ImportError as error:
            raise ShardError(f"{where} needs another package: {error}") from error
        protocols = self._fs.protocol
        self._atomic = not _WHOLE_OR_NOTHING.isdisjoint(
            [protocols] if isinstance(protocols, str) else protocols
        )
        staging = tempfile.mkdtemp(prefix="deeplens-lightning-")
        self._staging = Path(staging)
        weakref.finalize(self, shutil.rmtree, staging, ignore_errors=True)

    def sizes(self) -> dict[str, int]:
        """Bytes by file name."""
        self._fs.invalidate_cache()
        try:
            entries = self._fs.ls(self._root, detail=True)
        except FileNotFoundError:
            return {}
        names = {entry["name"].rsplit("/", 1)[-1]: entry for entry in entries if entry["type"] == "file"}
        return {name: int(names[name]["size"]) for name in sorted(names) if name and not name.startswith(".")}

    def read(self, name: str) -> bytes:
        """A small file's content."""
        return self.read_many([name])[0]

    def read_many(self, names: Sequence[str]) -> list[bytes]:
        """Several small files' contents, fetched at once where the file system can."""
        paths = [self._at(name) for name in names]
        try:
            contents = (
                self._fs.cat(paths) if len(paths) > 1 else {path: self._fs.cat_file(path) for path in paths}
            )
        except FileNotFoundError as error:
            raise DamagedShardError(f"a file of {self.where} is missing: {error}") from error
        return [contents[path] for path in paths]

    def write(self, name: str, content: bytes) -> None:
        """Put a small file in place at once."""
        staged = self.stage(f"{name}-{uuid4().hex}")
        staged.write_bytes(content)
        self.publish(staged, name)

    def stage(self, name: str) -> Path:
        """A local file to write to."""
        return self._staging / f"{TEMPORARY}{name}"

    def publish(self, staged: Path, name: str) -> None:
        """Upload a staged file and delete it here."""
        self._fs.makedirs(self._root, exist_ok=True)
        if self._atomic:
            self._fs.put_file(str(staged), self._at(name))
        else:
            unfinished = self._at(f"{TEMPORARY}{name}-{uuid4().hex}")
            self._fs.put_file(str(staged), unfinished)
            self.remove(name)
            self._fs.mv(unfinished, self._at(name))
        staged.unlink()

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""
        with suppress(FileNotFoundError):
            self._fs.rm(self._at(name))

    def clean(self, prefix: str) -> None:
        """Delete unfinished files whose names begin with `prefix`."""
        with suppress(FileNotFoundError):
            for path in self._fs.glob(self._at(f"{TEMPORARY}{prefix}*")):
                self._fs.rm(path)

    def lock(self, name: str) -> Lock:  # noqa: ARG002
        """Nothing to hold: object stores have no locks, the writer looks for strangers' sidecars."""
        return _NoLock()

    def free_bytes(self) -> int | None:
        """Not known."""
        return None

    def download(self, name: str, to: Path) -> None:
        """Copy a file to a local path."""
        try:
            self._fs.get_file(self._at(name), str(to))
        except FileNotFoundError as error:
            raise DamagedShardError(f"{self.where}/{name} is missing") from error

    def _at(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"


class LocalCopies:
    """Local copies of remote files, at most `max_bytes` of them.

    Args:
        directory: where to keep them; by default a temporary folder that goes away with this object.
        max_bytes: the bound; what was used longest ago is deleted first.
    """

    def __init__(self, directory: Path | None = None, max_bytes: int = CACHE_BYTES) -> None:
        self.max_bytes = max_bytes
        self._delete: Callable[[], object] | None = None
        if directory is None:
            directory = Path(tempfile.mkdtemp(prefix="deeplens-lightning-"))
            self._delete = weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True)
        self._directory = directory
        self._directory.mkdir(parents=True, exist_ok=True)
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="shard-fetch")
        weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)
        self._guard = ThreadLock()
        self._files: OrderedDict[Path, tuple[int, Future[None]]] = OrderedDict()

    def fetch(self, folder: Folder, name: str, size: int, sha256: str | None) -> None:
        """Start fetching a file unless it is here or on its way, and make room for it."""
        if size > self.max_bytes:
            raise ShardError(
                f"{folder.where}/{name} has {size:,} bytes, more than the {self.max_bytes:,} bytes allowed "
                "for local copies: raise cache_bytes"
            )
        path = self._path(folder, name)
        with self._guard:
            if path in self._files:
                self._files.move_to_end(path)
                return
            while sum(known for known, _ in self._files.values()) + size > self.max_bytes:
                old, (_, future) = self._files.popitem(last=False)
                future.cancel()
                with suppress(Exception):  # its error was for whoever asked for the file
                    future.cancelled() or future.result()
                old.unlink(missing_ok=True)
            self._files[path] = size, self._pool.submit(_download, folder, name, path, sha256)

    def get(self, folder: Folder, name: str, size: int, sha256: str | None) -> Path:
        """The local path of a file, as soon as it is here.

        Raises:
            DamagedShardError: it is missing, or did not arrive as it was written.
        """
        self.fetch(folder, name, size, sha256)
        path = self._path(folder, name)
        _, future = self._files[path]
        try:
            future.result()
        except BaseException:
            with self._guard:
                self._files.pop(path, None)
            raise
        return path

    def close(self) -> None:
        """Stop fetching, and delete a temporary folder."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._delete is not None:
            self._delete()

    def _path(self, folder: Folder, name: str) -> Path:
        return self._directory / blake2b(folder.where.encode(), digest_size=8).hexdigest() / name


def _download(folder: Folder, name: str, path: Path, sha256: str | None) -> None:
    if path.exists() and sha256 is not None and sha256_of(path) == sha256:
        return  # fetched by an earlier run that was given the same folder
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{TEMPORARY}{path.name}-{uuid4().hex}")
    try:
        folder.download(name, part)
        if sha256 is not None and (found := sha256_of(part)) != sha256:
            raise DamagedShardError(
                f"{folder.where}/{name} is altered: its checksum is {found}, its sidecar says {sha256}. "
                "Copy it again from where it was written, or delete it and extract again"
            )
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


class _NoLock:
    def release(self) -> None:
        """Nothing to let go of."""
