"""Find the files of text that paths, folders and globs name, and tell a list of paths from a list of texts."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

FORMATS = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
}
_COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
_LONGEST = 1024  # characters of a string that may be a path


def files_at(name: str) -> list[str]:
    """The files of text at a path, in a folder or of a glob, sorted; empty if there are none.

    Raises:
        ValueError: the path is a file of another format.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if format_of(name) is None:
            raise ValueError(
                f"{name!r} is not a {', '.join(sorted(FORMATS))} file; convert it, or load it yourself and give the "
                "list of texts as dataset_name"
            )
        return [str(path)]
    found = (
        path.rglob("*") if path.is_dir() else (Path(match) for match in glob.glob(str(path), recursive=True))
    )
    return sorted(str(match) for match in found if match.is_file() and format_of(str(match)) is not None)


def files_at_each(names: Sequence[str]) -> list[str]:
    """The files of text at several paths, in the order of the paths, each file once.

    Raises:
        FileNotFoundError: there is no file of text at one of the paths.
        ValueError: one of the paths is a file of another format.
    """
    found: dict[str, None] = {}
    for name in names:
        files = files_at(name)
        if not files:
            raise no_files(name)
        found.update(dict.fromkeys(files))
    return list(found)


def no_files(name: str) -> FileNotFoundError:
    """The error for a path that names no file of text."""
    return FileNotFoundError(
        f"dataset_name={name!r} matches no {', '.join(sorted(FORMATS))} file; "
        "give a file, a folder or a glob that exists, or a dataset id on the hub such as 'HuggingFaceFW/fineweb'"
    )


def paths_in(items: Sequence[Any]) -> list[str]:
    """The items of a list of paths; empty if the first item is a text.

    Raises:
        ValueError: the first item is a path, and another one is not.
    """
    if not len(items) or not _is_path(items[0]):
        return []
    other = next((item for item in items if not _is_path(item)), None)
    if other is not None:
        raise ValueError(
            f"dataset_name is a list whose first item, {fspath(items[0])!r}, is a path, and {other!r:.80} is not: give "
            "paths of files that exist, or texts; texts that look like paths can be given as "
            "datasets.Dataset.from_dict({'text': texts})"
        )
    return [fspath(item) for item in items]


def looks_local(name: str) -> bool:
    """Whether a name that matches no file was meant as a path, and not as the id of a dataset on the hub."""
    path = Path(name)
    return (
        any(c in name for c in "*?[")
        or name.startswith((".", "/", "~"))
        or path.exists()
        or format_of(name) is not None
        or name.count("/") > 2
    )


def format_of(file: str) -> str | None:
    """The format of a file by the ending of its name, as `datasets` calls it; None if it is not one of `FORMATS`."""
    path = Path(file)
    suffix = Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix
    return FORMATS.get(suffix.lower())


def _is_path(item: Any) -> bool:
    """Whether an item of a list is a path, not a text: the name of a file of text, or with folders and there."""
    if isinstance(item, PathLike):
        return True
    if not isinstance(item, str) or len(item) > _LONGEST or "\n" in item or "\0" in item:
        return False
    named, one_word = format_of(item) is not None, not any(map(str.isspace, item))
    nested = len(Path(item).parts) > 1
    if one_word and (named or (nested and "*" in item)):
        return True
    return (named or nested) and _exists(item)


def _exists(name: str) -> bool:
    try:
        return Path(name).expanduser().exists()
    except (OSError, RuntimeError):  # a name too long for a file, or `~` of a user that does not exist
        return False
