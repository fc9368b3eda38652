"""Expand what a user gives as `shards=` (paths, globs, lists, URLs) into folders and the files in them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

from deeplens_lightning.options import TIMEOUT
from deeplens_lightning.shards.errors import ShardError
from deeplens_lightning.shards.remote import ask, open_file_system

ShardPath: TypeAlias = str | os.PathLike[str]
"""A folder that `extract` wrote, a `.pt` file, a folder of such files, or a glob; local or an fsspec URL."""


def is_remote(where: str) -> bool:
    """Whether a path is a URL of something else than a local file system."""
    return "://" in where and not where.startswith(("file://", "local://"))


def group_paths(
    paths: ShardPath | Iterable[ShardPath], timeout: float = TIMEOUT
) -> dict[str, list[str] | None]:
    """Group paths by folder.

    Args:
        paths: one or several; globs are expanded.
        timeout: seconds without a byte after which a server is given up.

    Returns:
        By folder, the names of the `.pt` files to read in it; None for all of them.

    Raises:
        ShardError: there is no path, one matches nothing, or is not a path.
        UnreachableError: a server refuses, fails or does not answer.
        OSError: a folder on this machine cannot be listed.
    """
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not given:
        raise ShardError("shards= is empty: give a folder, a glob, a .pt file, or a list of them")
    if wrong := [path for path in given if not isinstance(path, (str, os.PathLike))]:
        raise ShardError(
            f"shards= holds a value of type {type(wrong[0]).__name__}, which is not a path: give a folder, a glob, a .pt "
            "file, a list of them, or one tensor (rows, d_in)"
        )
    groups: dict[str, list[str] | None] = {}
    for where in [found for path in given for found in _expand(str(path), timeout)]:
        if not where.endswith(".pt"):
            _check_folder(where)
            groups[where] = None
            continue
        folder, name = _split(where)
        files = groups.setdefault(folder, [])
        if files is not None and name not in files:
            files.append(name)
    return groups


def _expand(where: str, timeout: float) -> list[str]:
    if is_remote(where):
        if not any(sign in where for sign in "*?["):
            return [where.rstrip("/")]
        fs, pattern = open_file_system(where, timeout)
        matches = ask(where, "listed", lambda: sorted(fs.glob(pattern)), timeout)
        found = [fs.unstrip_protocol(match) for match in matches]
    else:
        try:
            path = Path(where.removeprefix("file://")).expanduser()
            if path.exists():
                return [str(path)]
            root = Path(path.anchor)
            found = [str(match) for match in sorted(root.glob(str(path.relative_to(root))))]
        except (
            ValueError,
            RuntimeError,
        ) as error:  # a zero byte, `a**b`, or `~` of a user that does not exist
            raise ShardError(
                f"{where!r} is not a path: {error}. Give a folder, a glob or a .pt file"
            ) from error
    found = [path for path in found if path.endswith(".pt") or not Path(path).suffix] or found
    if not found:
        raise ShardError(
            f"{where} matches nothing: give a folder that `extract` wrote, a glob, or a .pt file"
        )
    return found


def _check_folder(where: str) -> None:
    """Check that a path without the ending `.pt` is not a file."""
    if not is_remote(where) and Path(where).is_file():
        raise ShardError(
            f"{where} is a file that does not end in .pt: give a folder that `extract` wrote or a .pt file. To train on "
            "rows of another format, load them as a tensor (rows, d_in) and give the tensor as shards="
        )


def _split(where: str) -> tuple[str, str]:
    if is_remote(where):
        folder, _, name = where.rpartition("/")
        return folder, name
    return str(Path(where).parent), Path(where).name
