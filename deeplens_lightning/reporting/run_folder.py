"""Find the folder of a run, and read and write JSON files in it.

Every file that a callback writes is in this folder, beside Lightning's own files, so that a report needs only its path.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger

from deeplens_lightning.disk.files import append_to, make_folder, remove, truncate, write_whole

RESUMED = "resumed.json"
"""File that names the folder which a run continues from, and the step in the checkpoint."""


def run_folder(trainer: Trainer) -> Path:
    """The folder of this run, the same on every rank. A collective: every rank calls it.

    If the first logger is a CSV or TensorBoard logger, this is its `log_dir`. With another logger it is the folder where
    Lightning puts the run's checkpoints (`save_dir/name/version`), and without a logger `default_root_dir`.
    """
    folder = str(_folder(trainer)) if trainer.is_global_zero else ""
    return Path(trainer.strategy.broadcast(folder))


def note_earlier_part(folder: Path, earlier: Path | None, step: int) -> None:
    """Write to a run's folder which folder the run continues from, and delete such a note of another run.

    Args:
        folder: the run's folder.
        earlier: the folder of the run that saved the checkpoint; None for a new run.
        step: optimizer steps in the checkpoint.
    """
    note = folder / RESUMED
    if earlier is None:
        if note.is_file():
            remove(note)
    elif earlier != folder.absolute():
        try:  # relative, so that the folders of a run can be moved together
            place = os.path.relpath(earlier, folder.absolute())
        except ValueError:  # on another drive of Windows
            place = str(earlier)
        write_json(note, {"from": place, "step": step})


def parts_of(folder: Path) -> list[tuple[Path, float]]:
    """The folders of a run, the first one first, each with the step after which the next one continues.

    Args:
        folder: the last folder of the run.

    Returns:
        Folders that exist, each once, with their last steps; infinity for `folder`.
    """
    parts: list[tuple[Path, float]] = [(folder, math.inf)]
    while (note := parts[0][0] / RESUMED).is_file():
        content = json.loads(note.read_text(encoding="utf-8"))
        earlier = Path(os.path.normpath(parts[0][0] / content["from"]))
        if not earlier.is_dir() or earlier in [part for part, _ in parts]:
            break
        parts.insert(0, (earlier, min(float(content["step"]), parts[0][1])))
    return parts


def append_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append JSON objects to a file, one on each line; numbers that are not finite become null.

    An incomplete last line, from a killed process, is deleted first.
    """
    make_folder(path.parent)
    lines = [_json(record) + b"\n" for record in records]
    if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
        truncate(path, content.rfind(b"\n") + 1)
    with append_to(path) as file:
        file.writelines(lines)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that readers see all of it or nothing.

    Numbers that are not finite become null.
    """
    write_whole(path, _json(value))


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Read the objects of a JSON-lines file; an incomplete last line, from a killed process, is left out."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if not line.endswith("\n"):
                return
            yield json.loads(line)


def _folder(trainer: Trainer) -> str | os.PathLike[str]:
    if not trainer.loggers:
        return trainer.default_root_dir
    logger = trainer.loggers[0]
    if isinstance(logger, CSVLogger | TensorBoardLogger):
        return logger.log_dir
    if isinstance(logger, WandbLogger | MLFlowLogger):
        _ = logger.experiment  # starts the run, which gives it the id that names its folder
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or trainer.default_root_dir) / str(logger.name) / version


def _json(value: Any) -> bytes:
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False).encode(errors="backslashreplace")


def _finite(value: Any) -> Any:
    """The value with every number that is not finite replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
