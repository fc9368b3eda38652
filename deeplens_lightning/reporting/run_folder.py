"""The run's folder: which one it is, and how JSON gets into it.

Everything that a callback writes lies under this folder, beside Lightning's own files, so that
a report needs nothing but its path.
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


def run_folder(trainer: Trainer) -> Path:
    """The folder that belongs to this run alone, the same on every rank.

    With a CSV or TensorBoard logger first, its `log_dir`; with another logger, where Lightning puts
    that run's checkpoints (`save_dir/name/version`); with none, `default_root_dir`.

    This is a collective under DDP: every rank must call it.
    """
    folder = str(_folder(trainer)) if trainer.is_global_zero else ""
    return Path(trainer.strategy.broadcast(folder))


def append_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Add one JSON object a line; numbers that are not finite become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n" for record in records]
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(lines)


def write_json(path: Path, value: Any) -> None:
    """Write JSON under a temporary name and rename it, so that no reader meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    temporary.replace(path)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file; a last line that a kill cut short is left out."""
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
        _ = logger.experiment  # gives the run its id, which is the folder's name
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or trainer.default_root_dir) / str(logger.name) / version


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
