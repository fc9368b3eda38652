"""Open a cache's folder at a local path or at an fsspec URL."""

from __future__ import annotations

from deeplens_lightning.options import TIMEOUT
from deeplens_lightning.shards.folder import Folder, LocalFolder
from deeplens_lightning.shards.paths import ShardPath, is_remote
from deeplens_lightning.shards.remote import RemoteFolder


def open_folder(where: ShardPath, owner: str = "", timeout: float = TIMEOUT) -> Folder:
    """The folder at a local path or an fsspec URL; it need not exist yet.

    Args:
        where: path or URL.
        owner: name of the writer, which unfinished files bear; not needed to read.
        timeout: seconds without a byte after which a server is given up.

    Raises:
        ShardError: the URL's protocol is not known, or needs a package that is not installed.
        UnreachableError: the server cannot be reached.
    """
    return RemoteFolder(str(where), owner, timeout) if is_remote(str(where)) else LocalFolder(where, owner)
