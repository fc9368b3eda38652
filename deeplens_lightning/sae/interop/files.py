"""Write a folder atomically: it appears complete, or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deeplens_lightning.disk.files import make_folder, remove_folder, replace, sync_file, sync_folder


@contextmanager
def fresh_folder(folder: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder, which is renamed to `folder` if the block ends without an error.

    A kill leaves the older folder, the new one, or none of that name and the older one whole inside a hidden folder.

    Args:
        folder: the final path.
        overwrite: replace an existing folder.

    Raises:
        FileExistsError: `folder` exists, is not an empty folder, and `overwrite` is False.
    """
    folder = Path(folder)
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"{folder} exists already: choose another folder, or pass overwrite=True to replace it"
        )
    make_folder(folder.parent)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    new, old = temporary / "new", temporary / "old"
    try:
        make_folder(new)
        yield new
        for path in new.iterdir():
            sync_file(path)
        sync_folder(new)
        if folder.is_dir():
            replace(folder, old)
        replace(new, folder)
    finally:
        remove_folder(temporary)
