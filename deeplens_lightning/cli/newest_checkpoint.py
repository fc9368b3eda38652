"""Find the newest intact checkpoint, so that a restarted job continues without a change of its command.

A job that is killed while it saves leaves an incomplete checkpoint, or removes `last.ckpt` before it writes the next
one. `--ckpt_path newest:FOLDER` continues from the newest file that is intact.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

import torch

from deeplens_lightning.disk.torch_files import DamagedFileError, check_crcs

NEWEST = "newest:"


def newest_checkpoint(folder: str | Path) -> Path | None:
    """Return the intact `*.ckpt` file that was written last, in a folder or any folder below it.

    Every byte is read and compared with the file's own checksums. Damaged files are skipped, not deleted.

    Args:
        folder: on a local or mounted file system; it need not exist.

    Returns:
        The path; None if there is no intact checkpoint, as on the first start of a job.
    """
    found = [(path.stat().st_mtime_ns, path) for path in Path(folder).rglob("*.ckpt") if path.is_file()]
    return next((path for _, path in sorted(found, reverse=True) if loads(path)), None)


def loads(path: Path) -> bool:
    """Whether a checkpoint is intact: a complete zip file with matching checksums that loads with `weights_only=True`."""
    try:
        check_crcs(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, DamagedFileError, pickle.UnpicklingError):
        return False
    return isinstance(checkpoint, dict) and "loops" in checkpoint


def with_newest(words: Sequence[str]) -> list[str]:
    """Replace `--ckpt_path newest:FOLDER` by the checkpoint found.

    Args:
        words: words of the command line.

    Returns:
        The words with the path in place of `newest:FOLDER`; without the option if there is no checkpoint yet.
    """
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
