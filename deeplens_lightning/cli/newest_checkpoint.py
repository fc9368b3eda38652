"""The newest checkpoint that loads, so that a job that is started again goes on by itself.

A kill can leave a checkpoint half-written, or none where `last.ckpt` was being replaced: whoever goes on should
take the newest file that is whole. `--ckpt_path newest:FOLDER` does so on the command line.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch

NEWEST = "newest:"


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The `*.ckpt` file written last, anywhere below a folder, that is whole.

    Every byte is read once and compared with the checksum beside it; files that do not pass are left alone.

    Args:
        folder: on a local or mounted file system; need not exist.

    Returns:
        None where there is none: a first start.
    """
    found = [(path.stat().st_mtime_ns, path) for path in Path(folder).rglob("*.ckpt") if path.is_file()]
    return next((path for _, path in sorted(found, reverse=True) if loads(path)), None)


def loads(path: Path) -> bool:
    """Whether a checkpoint is whole: it was closed, all its parts have their checksums, and it unpickles."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return False
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError):
        return False
    return isinstance(checkpoint, dict) and "loops" in checkpoint


def with_newest(words: Sequence[str]) -> list[str]:
    """Command-line words with `--ckpt_path newest:FOLDER` resolved, or left out where there is none yet."""
    found: list[str] = []
    for word in words:
        name, equals, value = word.partition("=")
        if found and found[-1] == "--ckpt_path" and word.startswith(NEWEST):
            found.pop()
            name, equals, value = "--ckpt_path", "=", word
        if name == "--ckpt_path" and equals and value.startswith(NEWEST):
            path = newest_checkpoint(value.removeprefix(NEWEST))
            found += [f"--ckpt_path={path}"] if path is not None else []
        else:
            found.append(word)
    return found
