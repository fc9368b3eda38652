"""From what a user points at to folders and files: paths, globs, lists, URLs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import fsspec

from deeplens_lightning.shards.errors import ShardError
from deeplens_lightning.shards.remote import is_remote

Source = str | os.PathLike[str]
"""A folder that `extract` wrote, a `.pt` file, a folder of such files, or a glob; local or an fsspec URL."""


def group_sources(sources: Source | Iterable[Source]) -> dict[str, list[str] | None]:
    """The folders that sources lie in, each with the files meant in it, or None for all of them.

    Raises:
        ShardError: there is no source, or one matches nothing.
    """
    given = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    if not given:
        raise ShardError("shards= names nothing: give a folder, a glob, a .pt file, or a list of them")
    groups: dict[str, list[str] | None] = {}
    for where in [path for source in given for path in _expand(str(source))]:
        if not where.endswith(".pt"):
            groups[where] = None
            continue
        folder, name = _split(where)
        files = groups.setdefault(folder, [])
        if files is not None and name not in files:
            files.append(name)
    return groups


def _expand(source: str) -> list[str]:
    if is_remote(source):
        if not any(sign in source for sign in "*?["):
            return [source.rstrip("/")]
        fs, path = fsspec.core.url_to_fs(source)
        found = [fs.unstrip_protocol(match) for match in sorted(fs.glob(path))]
    else:
        path = Path(source.removeprefix("file://")).expanduser()
        if path.exists():
            return [str(path)]
        root = Path(path.anchor)
        found = [str(match) for match in sorted(root.glob(str(path.relative_to(root))))]
    found = [path for path in found if path.endswith(".pt") or not Path(path).suffix] or found
    if not found:
        raise ShardError(
            f"{source} matches nothing: give a folder that `extract` wrote, a glob, or a .pt file"
        )
    return found


def _split(where: str) -> tuple[str, str]:
    if is_remote(where):
        folder, _, name = where.rpartition("/")
        return folder, name
    return str(Path(where).parent), Path(where).name
