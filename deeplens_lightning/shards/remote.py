"""Read and write a cache's folder behind an fsspec URL (S3, GCS, Azure, the Hugging Face hub, HTTP, …).

A shard is written to a local temporary folder first and uploaded when it is complete. Readers fetch shards through
`local_copies.py`. Requests that fail are repeated, and a server that sends nothing is given up (`patience.py`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import fsspec

from deeplens_lightning.disk.files import TEMPORARY, announce, create, remove, upload
from deeplens_lightning.disk.locks import TemporaryFolder
from deeplens_lightning.disk.mistakes import NO_SPACE, naming, sentence, storage_errors, timeouts
from deeplens_lightning.options import TIMEOUT
from deeplens_lightning.shards.errors import DamagedShardError, ShardError, UnreachableError
from deeplens_lightning.shards.folder import Lock, unfinished_name
from deeplens_lightning.shards.patience import patiently

T = TypeVar("T")

_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf"}
"""Protocols where a file appears only when its upload is complete; on others, upload and then rename."""
_HTTP = ("http://", "https://")
_AT_ONCE = 32
"""Number of small files in one request, so that each request shows that the server answers."""
_SLOWEST = 1e6
"""Bytes per second. An upload reports no progress; it has `timeout` and the time that this speed needs."""


class RemoteFolder:
    """A folder at an fsspec URL; the methods are those of `folder.Folder`.

    A plain HTTP server can be read if it answers the folder's URL with a page of links to its files, as
    `python -m http.server` does. It cannot be written.

    Args:
        where: the URL, such as `s3://bucket/acts`.
        owner: name of the writer, which unfinished files bear; one process at a time writes as this owner.
        timeout: seconds without a byte after which the server is given up.

    Attributes:
        where: the URL without a slash at the end.

    Raises:
        ShardError: the URL's protocol is not known, or needs a package that is not installed.
        UnreachableError: the server cannot be reached.
    """

    def __init__(self, where: str, owner: str = "", timeout: float = TIMEOUT) -> None:
        self.where = where.rstrip("/")
        self._owner, self._timeout = owner, timeout
        self._fs, self._root = open_file_system(self.where, timeout)
        protocols = self._fs.protocol
        self._atomic = not _OBJECT_STORES.isdisjoint([protocols] if isinstance(protocols, str) else protocols)
        self._staging = TemporaryFolder()

    def create(self) -> None:
        """Create the folder, where the file system has folders and it does not exist.

        Raises:
            ShardError: the file system cannot be written.
            UnreachableError: the server refuses, fails or does not answer.
        """
        self._check_writable()
        announce("make folder", self._root)
        self._request("written", "", lambda: self._fs.makedirs(self._root, exist_ok=True))

    def sizes(self) -> dict[str, int]:
        """Bytes by file name, sorted, without unfinished files; empty if the folder does not exist.

        Raises:
            UnreachableError: the server refuses, fails or does not answer, or does not list its files.
        """
        try:
            entries = self._request("listed", "", self._list)
        except FileNotFoundError as error:
            if self.where.startswith(_HTTP):
                raise UnreachableError(
                    f"{self.where} cannot be listed: the server has no page of links for it. Serve the folder with "
                    "`python -m http.server` or from an object store, or copy it to a local folder"
                ) from error
            return {}
        found = {entry["name"].rsplit("/", 1)[-1]: entry for entry in entries if entry["type"] == "file"}
        names = [name for name in sorted(found) if name and name[0] not in ".?#"]
        unknown = [name for name in names if found[name]["size"] is None]
        try:
            counted = self._pieces("listed", self._count, unknown)
        except FileNotFoundError as error:
            raise DamagedShardError(f"a file of {self.where} is missing: {error}") from error
        for name, size in zip(unknown, counted, strict=True):
            if size is None:
                raise UnreachableError(
                    f"{self.where}/{name} cannot be used: the server does not say how large it is. Copy the folder to a "
                    "local one"
                )
            found[name]["size"] = size
        return {name: int(found[name]["size"]) for name in names}

    def read(self, name: str) -> bytes:
        """The content of one small file.

        Raises:
            DamagedShardError: the file does not exist.
            UnreachableError: the server refuses, fails or does not answer.
        """
        return self.read_many([name])[0]

    def read_many(self, names: Sequence[str]) -> list[bytes]:
        """The contents of several small files, fetched concurrently where the file system supports it.

        Raises:
            DamagedShardError: a file does not exist.
            UnreachableError: the server refuses, fails or does not answer.
        """
        try:
            return list(self._pieces("read", self._cat, names))
        except FileNotFoundError as error:
            raise DamagedShardError(f"a file of {self.where} is missing: {error}") from error

    def write(self, name: str, content: bytes) -> None:
        """Write a small file so that readers see all of it or nothing."""
        staged = self.stage(f"{name}-{uuid4().hex}")
        with naming(staged), create(staged) as file:
            file.write(content)
        self.publish(staged, name)

    def stage(self, name: str) -> Path:
        """A path in a local temporary folder, to write the file `name` to before `publish`."""
        return self._staging.path / unfinished_name(self._owner, name)

    def publish(self, staged: Path, name: str) -> None:
        """Upload a staged file under its final name and delete the local one.

        Raises:
            ShardError: the file system cannot be written.
            UnreachableError: the server refuses, fails or does not answer.
        """
        self._check_writable()
        more = staged.stat().st_size / _SLOWEST
        self._request("written", name, lambda: self._upload(staged, name), more)
        remove(staged)

    def remove(self, name: str) -> None:
        """Delete a file if it exists."""
        announce("remove", self._at(name))
        with suppress(FileNotFoundError):
            self._request("deleted", name, lambda: self._fs.rm(self._at(name)))

    def clean(self) -> None:
        """Delete the unfinished files that an earlier process of the same owner left."""
        with suppress(FileNotFoundError):
            pattern = self._at(f"{TEMPORARY}{self._owner}*")
            for path in self._request("listed", "", lambda: self._fs.glob(pattern)):
                self.remove(path.rsplit("/", 1)[-1])

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
            UnreachableError: the server refuses, fails or does not answer.
            OSError: the local file cannot be written.
        """

        def get() -> None:
            try:
                self._fs.get_file(self._at(name), str(to))
            except OSError as error:
                if error.errno in NO_SPACE:
                    error.filename = str(to)
                raise

        def progress() -> object:
            return (stat.st_size, stat.st_mtime_ns) if (stat := _stat(to)) is not None else None

        try:
            self._request("read", name, get, 0.0, progress)
        except FileNotFoundError as error:
            raise DamagedShardError(f"{self.where}/{name} is missing") from error

    def _list(self) -> list[dict[str, Any]]:
        self._fs.invalidate_cache()
        return list(self._fs.ls(self._root, detail=True))

    def _count(self, paths: list[str]) -> list[int | None]:
        try:
            return list(self._fs.sizes(paths))
        except FileNotFoundError as error:
            if error.__cause__ is not None:  # fsspec says so of HTTP servers that fail or do not answer, too
                raise error.__cause__ from None
            raise

    def _cat(self, paths: list[str]) -> list[bytes]:
        if len(paths) == 1:
            return [self._fs.cat_file(paths[0])]
        contents = self._fs.cat(paths)
        return [contents[path] for path in paths]

    def _upload(self, staged: Path, name: str) -> None:
        if self._atomic:
            upload(self._fs, staged, self._at(name))
            return
        unfinished = self._at(f"{unfinished_name(self._owner, name)}-{uuid4().hex}")
        upload(self._fs, staged, unfinished)
        announce("remove", self._at(name))
        with suppress(FileNotFoundError):
            self._fs.rm(self._at(name))
        announce("replace", self._at(name))
        self._fs.mv(unfinished, self._at(name))

    def _check_writable(self) -> None:
        if self.where.startswith(_HTTP):
            raise ShardError(
                f"{self.where} cannot be written: HTTP is for reading; give a local folder or an object store"
            )

    def _pieces(self, done: str, request: Callable[[list[str]], list[T]], names: Sequence[str]) -> list[T]:
        """Make requests about many files, some at a time."""
        pieces = [names[start : start + _AT_ONCE] for start in range(0, len(names), _AT_ONCE)]
        answers = (
            self._request(done, piece[0], partial(request, [*map(self._at, piece)])) for piece in pieces
        )
        return list(chain.from_iterable(answers))

    def _request(
        self,
        done: str,
        name: str,
        request: Callable[[], T],
        more: float = 0.0,
        progress: Callable[[], object] = lambda: None,
    ) -> T:
        where = f"{self.where}/{name}".rstrip("/")
        return ask(where, done, request, self._timeout + more, progress)

    def _at(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"


class _NoLock:
    def release(self) -> None:
        """Do nothing: no lock is held."""


def open_file_system(where: str, timeout: float) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of an fsspec URL, and the URL's path in it.

    Raises:
        ShardError: the URL's protocol is not known, or needs a package that is not installed.
        UnreachableError: the server cannot be reached.
    """
    try:
        options = _http_options(where, timeout) if where.startswith(_HTTP) else {}
        fs, path = ask(where, "opened", lambda: fsspec.core.url_to_fs(where, **options), timeout)
        return fs, path
    except ImportError as error:
        raise ShardError(f"{where} needs another package: {error}") from error


def _http_options(where: str, timeout: float) -> dict[str, Any]:
    """Settings of an HTTP file system: its default ends a download after five minutes, whatever arrives."""
    from aiohttp import ClientTimeout

    limits = ClientTimeout(total=None, sock_connect=timeout / 3, sock_read=timeout / 3)
    given = fsspec.config.conf.get(where.partition(":")[0], {}).get("client_kwargs", {})
    return {"client_kwargs": {"timeout": limits, **given}}


def ask(
    where: str,
    done: str,
    request: Callable[[], T],
    seconds: float,
    progress: Callable[[], object] = lambda: None,
) -> T:
    """Make a request with `patiently`, and say its error in one sentence.

    Args:
        where: the URL that the request is about.
        done: what the request does to it, as a participle.
        request: the request.
        seconds: give up after this time without progress.
        progress: returns something else than before whenever the request has progressed.

    Raises:
        FileNotFoundError: the server has no such file.
        UnreachableError: the server refuses, fails or does not answer.
        OSError: a local file cannot be written.
        ShardError: the file system cannot do this.
    """
    try:
        return patiently(request, seconds, progress)
    except FileNotFoundError:
        raise
    except timeouts() as error:
        raise UnreachableError(
            f"{where} cannot be {done}: the server was given up after {seconds:,.3g} seconds without a byte. Check the "
            "address and the network, or raise cache_options.timeout (timeout= of ShardStream), and run the command again"
        ) from error
    except (ValueError, NotImplementedError) as error:
        reason = str(error).strip() or "its file system does not support this"
        raise ShardError(f"{where} cannot be {done}: {reason}. Give a local folder or another URL") from error
    except storage_errors() as error:
        if isinstance(error, OSError) and error.filename and Path(error.filename).is_absolute():
            raise  # a local file
        raise UnreachableError(f"{where} cannot be {done}: {sentence(error)}") from error


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None
