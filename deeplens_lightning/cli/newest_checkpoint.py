"""Find the checkpoint that `--ckpt_path` names, so that a restarted job continues without a change of its command.

In: the value of `--ckpt_path`, which is a path or `newest:FOLDER`. Out: the path of a checkpoint. A job that is killed
while it saves leaves an incomplete checkpoint, or removes `last.ckpt` before it writes the next one; `newest:FOLDER` is
the newest file that is intact.
"""

from __future__ import annotations

import pickle
from collections.abc import Set
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_info

from deeplens_lightning.disk.torch_files import DamagedFileError, check_crcs

NEWEST = "newest:"
WEIGHTS = frozenset({"loops", "state_dict"})
"""Entries of every checkpoint."""
CONTINUES = WEIGHTS | {"optimizer_states"}
"""Entries of a checkpoint from which a fit continues; one that was saved with `save_weights_only` has no optimizer."""
_OF_THIS_RUN = ("last", "best")  # words of Lightning that mean nothing in a process that has not trained yet


def checkpoint_path(given: str | Path | None, command: str, runs: str | Path) -> str | None:
    """The path of the checkpoint that `--ckpt_path` names.

    Args:
        given: a path or URL, `newest:FOLDER`, or None.
        command: `fit`, `validate`, `test` or `predict`.
        runs: the folder with the runs of this configuration, for messages.

    Returns:
        A path; None without one, and for a fit where the folder has no intact checkpoint yet, as on the first start of
        a job. That is said, as is each damaged file.

    Raises:
        ValueError: `last` or `best`, a folder that cannot be searched, or no intact checkpoint for a command that needs
            one.
        FileNotFoundError: there is no such file.
    """
    if given is None:
        return None
    given = str(given)
    if given in _OF_THIS_RUN:
        raise ValueError(
            f"--ckpt_path {given}: Lightning would look only in the folder of the run that starts now; give the path of "
            f"a checkpoint, or {NEWEST}{runs} for the newest intact one below {runs}"
        )
    if not given.startswith(NEWEST):
        if given != "hpc" and ":" not in given and not Path(given).exists():
            raise FileNotFoundError(
                f"--ckpt_path {given}: there is no such file; {NEWEST}{runs} finds the newest intact one below {runs}"
            )
        return given
    folder = given.removeprefix(NEWEST)
    if not folder or "://" in folder:
        raise ValueError(
            f"--ckpt_path {given}: give a local folder, such as {NEWEST}{runs}, or the path of a checkpoint"
        )
    found = newest_checkpoint(folder, CONTINUES if command == "fit" else WEIGHTS)
    if found is None and command != "fit":
        raise ValueError(
            f"--ckpt_path {given}: there is no intact checkpoint below {folder}, and {command} needs one"
        )
    if found is None:
        rank_zero_info(
            f"--ckpt_path {given}: no checkpoint to continue from, so training starts from the beginning"
        )
    return None if found is None else str(found)


def newest_checkpoint(folder: str | Path, entries: Set[str] = CONTINUES) -> Path | None:
    """Return the intact `*.ckpt` file that was written last, in a folder or any folder below it.

    Every byte is read and compared with the file's own checksums. Damaged files are named and skipped, not deleted.

    Args:
        folder: on a local or mounted file system; it need not exist. `~` is the home folder.
        entries: what the checkpoint must contain.

    Returns:
        The path; None if there is no intact checkpoint, as on the first start of a job.
    """
    paths = [path for path in Path(folder).expanduser().rglob("*.ckpt") if path.is_file()]
    for path in sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path), reverse=True):
        if (missing := _missing(path, entries)) is None:
            return path
        rank_zero_info(f"{path} is passed over: {missing}")
    return None


def _missing(path: Path, entries: Set[str]) -> str | None:
    """What is wrong with a checkpoint; None if it is a complete zip file with matching checksums and these entries."""
    try:
        check_crcs(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, DamagedFileError, pickle.UnpicklingError):
        return "it is damaged"
    absent = sorted(entries - checkpoint.keys()) if isinstance(checkpoint, dict) else sorted(entries)
    return f"it has no {' and no '.join(absent)}" if absent else None
