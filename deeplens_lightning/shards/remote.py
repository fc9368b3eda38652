"""Read and write a cache's folder behind an fsspec URL (S3, GCS, Azure, the Hugging Face hub, …).

A shard is written to a local temporary folder first and uploaded when it is complete. Readers fetch shards through
`local_copies.py`.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import fsspec

from deeplens_lightning.disk.files import TEMPORARY, announce, create, remove, upload
from deeplens_lightning.shards.errors import DamagedShardError, ShardError
from deeplens_lightning.shards.folder import Lock, unfinished_name

_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf"}
"""Protocols where a file appears only when its upload is complete; on others, upload and then rename."""


class RemoteFolder:
    """A folder at an fsspec URL; the methods are those of `folder.Folder`.

    Args:
        where: the URL, such as `s3://bucket/acts`.
        owner: name of the writer, which unfinished files bear; one process at a time writes as this owner.

    Attributes:
        where: the URL without a slash at the end.

    Raises:
        ShardError: the URL's file system needs a package that is not installed.
    """

    def __init__(self, where: str, owner: str = "") -> None:
        self.where = where.rstrip("/")
        self._owner = owner
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.where)
        except ImportError as error:
            raise ShardError(f"{where} needs another package: {error}") from error
        protocols = self._fs.protocol
        self._atomic = not _OBJECT_STORES.isdisjoint([protocols] if isinstance(protocols, str) else protocols)
        staging = tempfile.mkdtemp(prefix="deeplens-lightning-")
        self._staging = Path(staging)
        weakref.finalize(self, shutil.rmtree, staging, ignore_errors=True)

    def create(self) -> None:
        """Create the folder, where the file system has folders and it does not exist."""
        announce("make folder", self._root)
        self._fs.makedirs(self._root, exist_ok=True)

    def sizes(self) -> dict[str, int]:
        """Bytes by file name, sorted, without unfinished files; empty if the folder does not exist."""
        self._fs.invalidate_cache()
        try:
            entries = self._fs.ls(self._root, detail=True)
        except FileNotFoundError:
            return {}
        names = {entry["name"].rsplit("/", 1)[-1]: entry for entry in entries if entry["type"] == "file"}
        return {name: int(names[name]["size"]) for name in sorted(names) if name and not name.startswith(".")}

    def read(self, name: str) -> bytes:
        """The content of one small file.

        Raises:
            DamagedShardError: the file does not exist.
        """
        return self.read_many([name])[0]

    def read_many(self, names: Sequence[str]) -> list[bytes]:
        """The contents of several small files, fetched concurrently where the file system supports it.

        Raises:
            DamagedShardError: a file does not exist.
        """
        paths = [self._at(name) for name in names]
        try:
            contents = (
                self._fs.cat(paths) if len(paths) > 1 else {path: self._fs.cat_file(path) for path in paths}
            )
        except FileNotFoundError as error:
            raise DamagedShardError(f"a file of {self.where} is missing: {error}") from error
        return [contents[path] for path in paths]

    def write(self, name: str, content: bytes) -> None:
        """Write a small file so that readers see all of it or nothing."""
        staged = self.stage(f"{name}-{uuid4().hex}")
        with create(staged) as file:
            file.write(content)
        self.publish(staged, name)

    def stage(self, name: str) -> Path:
        """A path in a local temporary folder, to write the file `name` to before `publish`."""
        return self._staging / unfinished_name(self._owner, name)

    def publish(self, staged: Path, name: str) -> None:
        """Upload a staged file under its final name and delete the local one."""
        if self._atomic:
            upload(self._fs, staged, self._at(name))
        else:
            unfinished = self._at(f"{unfinished_name(self._owner, name)}-{uuid4().hex}")
            upload(self._fs, staged, unfinished)
            self.remove(name)
            announce("replace", self._at(name))
            self._fs.mv(unfinished, self._at(name))
        remove(staged)

    def remove(self, name: str) -> None:
        """Delete a file if it exists."""
        announce("remove", self._at(name))
        with suppress(FileNotFoundError):
            self._fs.rm(self._at(name))

    def clean(self) -> None:
        """Delete the unfinished files that an earlier process of the same owner left."""
        with suppress(FileNotFoundError):
            for path in self._fs.glob(self._at(f"{TEMPORARY}{self._owner}*")):
                announce("remove", path)
                self._fs.rm(path)

    def lock(self, name: str) -> Lock:  # noqa: ARG002
        """A lock that locks nothing: object stores have none. The writer notices a second writer by its sidecars."""
        return _NoLock()

    def free_bytes(self) -> int | None:
        """None: the free space is not known."""
        return None

    def download(self, name: str, to: Path) -> None:
        """Copy a file to a local path.

        Raises:
            DamagedShardError: the file does not exist.
        """
        try:
            self._fs.get_file(self._at(name), str(to))
        except FileNotFoundError as error:
            raise DamagedShardError(f"{self.where}/{name} is missing") from error

    def _at(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"


class _NoLock:
    def release(self) -> None:
        """Do nothing: no lock is held."""
