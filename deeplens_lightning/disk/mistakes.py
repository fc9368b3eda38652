"""List the errors that a user or the world causes (disks, networks, servers), and say each in one sentence.

This is the only such list. The command line prints these errors without a traceback; `shards/remote.py` turns those of
storage into `ShardError`.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike, fspath, strerror
from pkgutil import resolve_name

_TIMEOUTS = (
    "asyncio:TimeoutError", "concurrent.futures:TimeoutError", "botocore.exceptions:ConnectTimeoutError",
    "botocore.exceptions:ReadTimeoutError", "httpx:TimeoutException",
)  # fmt: skip
_OF_STORAGE = (
    *_TIMEOUTS, "http.client:HTTPException", "aiohttp:ClientError",
    "botocore.exceptions:BotoCoreError", "botocore.exceptions:ClientError", "botocore.parsers:ResponseParserError",
    "httpx:HTTPError", "urllib3.exceptions:HTTPError", "google.auth.exceptions:GoogleAuthError", "gcsfs.retry:HttpError",
    "azure.core.exceptions:AzureError", "paramiko:SSHException",
)  # fmt: skip
"""Errors of libraries for storage that are not OSErrors, as `module:class`."""

_OF_LIBRARIES = (
    "lightning.fabric.utilities.exceptions:MisconfigurationException",
    "datasets.exceptions:DatasetsError",
)
"""Errors with which other libraries say that a setting or a dataset is wrong, or that a disk is full."""

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a disk that is full, a quota that is used up, and a file that may not grow further."""
_FREE = "free some space there or give another folder, then run the same command again"
_PERMISSION = "change its permissions, or give another path"
_NETWORK = "check the address, the credentials and the network, then run the same command again"
_ADVICE = {
    errno.ENOSPC: _FREE,
    errno.EDQUOT: _FREE,
    errno.EFBIG: "raise the limit (`ulimit -f`), or give a folder on another file system",
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EROFS: "give a folder on a file system that can be written to",
    errno.ENOENT: "give a path that exists",
    errno.EEXIST: "give another path",
    errno.ENOTDIR: "a part of this path is a file; give another path",
    errno.EISDIR: "give the path of a file",
    errno.ELOOP: "its symbolic links lead in a circle; give the path that they should lead to",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.EMFILE: "raise the limit of open files (`ulimit -n`)",
    errno.ENFILE: "raise the machine's limit of open files",
    errno.EIO: "the disk or its network mount fails; check it, or give a folder on another one",
    errno.ESTALE: "the network mount has lost this file; mount it again, then run the same command again",
    errno.ENOMEM: "free some memory, then run the same command again",
    errno.ECONNREFUSED: _NETWORK,
    errno.ECONNRESET: _NETWORK,
    errno.ECONNABORTED: _NETWORK,
    errno.EPIPE: _NETWORK,
    errno.ETIMEDOUT: _NETWORK,
    errno.EHOSTUNREACH: _NETWORK,
    errno.ENETUNREACH: _NETWORK,
}
_LOCAL = {number for number, advice in _ADVICE.items() if advice is not _NETWORK} - {errno.EIO, errno.ESTALE}


def timeouts() -> tuple[type[Exception], ...]:
    """Errors of a request that was not answered in time."""
    return (TimeoutError, *_imported(_TIMEOUTS))


def storage_errors() -> tuple[type[Exception], ...]:
    """Errors of files, networks and storage servers: OSError, and those of the libraries that are imported by now."""
    return (OSError, *_imported(_OF_STORAGE))


def mistakes() -> tuple[type[Exception], ...]:
    """All errors that are said in one sentence: `storage_errors`, wrong values, missing packages, those of libraries."""
    return (ValueError, ModuleNotFoundError, *_imported(_OF_LIBRARIES), *storage_errors())


def may_pass(error: BaseException) -> bool:
    """Whether an error of storage may be gone at the next try: not a missing file, a permission or a full disk."""
    lasting = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError)
    return not isinstance(error, lasting) and not (isinstance(error, OSError) and error.errno in _LOCAL)


def sentence(error: BaseException) -> str:
    """Say which file or server an error is about, what is wrong, and what to do.

    Messages that are sentences of this package are returned as they are.
    """
    if isinstance(error, OSError) and error.errno is not None:
        places = [
            fspath(name) for name in (error.filename, error.filename2) if isinstance(name, (str, PathLike))
        ]
        reason = (error.strerror or strerror(error.errno)).rstrip(".")
        advice = _ADVICE.get(error.errno, _NETWORK if not places else "give another path, or try again")
        return f"{': '.join([*places, reason])}: {advice}"
    text = str(error).strip()
    if (
        isinstance(error.__cause__, OSError)
        and error.__cause__.errno in _LOCAL
        and not isinstance(error, ValueError)
    ):
        return f"{text.rstrip('.') or type(error).__name__}: {sentence(error.__cause__)}"
    if isinstance(error, PermissionError) and not error.filename:
        return f"{text or 'not allowed'}: check the credentials and the permissions"
    if isinstance(error, ValueError) or (
        text and type(error) in (FileNotFoundError, FileExistsError, OSError)
    ):
        return text or type(error).__name__
    if isinstance(error, storage_errors()):
        text = " ".join(text.split()) or "the server or device did not answer in time"
        return f"{text} ({type(error).__name__}): {_NETWORK}"
    return text or type(error).__name__


@contextmanager
def naming(path: str | PathLike[str]) -> Iterator[None]:
    """Add a path to an OSError that lacks one, such as that of a write to a full disk.

    Args:
        path: the file that is read or written in the `with` block.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = fspath(path)
        raise


def _imported(names: tuple[str, ...]) -> list[type[Exception]]:
    """The classes whose modules are imported; an error of another module cannot have been raised."""
    return [resolve_name(name) for name in names if name.partition(":")[0] in sys.modules]
