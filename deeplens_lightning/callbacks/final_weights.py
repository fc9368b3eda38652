"""Save the last weights of a fit, and find the checkpoint that holds the weights of one moment of the fit.

In: a Trainer at the end of a fit, or after an error in it. Out: the path of a full checkpoint of the last weights, which
a resume continues from exactly.
"""

from __future__ import annotations

import pickle
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fsspec.core import url_to_fs
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from deeplens_lightning.callbacks.support import from_rank_zero
from deeplens_lightning.preemption import Preemption

_WORD = 8  # bytes of a 64-bit integer


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The weights of a module at one moment of a fit.

    Attributes:
        step: optimizer steps taken.
        checksums: a checksum of each parameter and buffer by name; empty on other ranks than 0, and where a rank holds a
            part of the weights only.
    """

    step: int
    checksums: Mapping[str, int]

    @classmethod
    def now(cls, trainer: Trainer) -> Weights:
        """The weights in training."""
        checksums: dict[str, int] = {}
        if trainer.is_global_zero and _ranks_hold_all_weights(trainer):
            module = trainer.lightning_module
            for named in (module.named_parameters, module.named_buffers):
                checksums |= {name: _checksum(t) for name, t in named(remove_duplicate=False)}
        return cls(step=trainer.global_step, checksums=checksums)

    def are_in(self, checkpoint: Mapping[str, Any]) -> bool:
        """Whether a checkpoint was saved from these weights: whether all checksums are equal."""
        if checkpoint["global_step"] != self.step:
            return False
        # Lightning's `WeightAveraging` saves the average as `state_dict`, and the weights in training beside it.
        saved = checkpoint.get("current_model_state", checkpoint["state_dict"])
        tensors = {name: value for name, value in saved.items() if isinstance(value, Tensor)}
        return bool(tensors) and all(self.checksums.get(name) == _checksum(t) for name, t in tensors.items())


class KeptWeights:
    """Save the last weights of one fit unless a checkpoint callback has saved them, and know which file holds them.

    Args:
        folder: folder of the run. The file is in the folder of the first `ModelCheckpoint`, or else in `checkpoints` in
            the folder of the run.

    Attributes:
        last: the last weights; None until they were to be saved.
        file: path of a full checkpoint of the last weights; None if there is none.
    """

    NAME = "final"

    def __init__(self, folder: Path) -> None:
        self.last: Weights | None = None
        self.file: str | None = None
        self._folder = folder
        self._paths: dict[str, None] = {}  # in the order in which they were first seen

    def note(self, trainer: Trainer) -> None:
        """Remember the files that checkpoint callbacks have saved by now, also those that they name no longer later."""
        for callback in trainer.checkpoint_callbacks:
            paths: list[Any] = []
            if isinstance(callback, ModelCheckpoint):
                paths = [*callback.best_k_models, callback.best_model_path, callback.last_model_path]
            elif isinstance(callback, OnExceptionCheckpoint):
                paths = [callback.ckpt_path]
            elif isinstance(callback, Preemption):
                paths = [callback.path(trainer)]
            self._paths.update({str(path): None for path in paths if path})

    def save(self, trainer: Trainer) -> None:
        """Save the last weights unless they are in a file already. A collective: every rank calls it."""
        self.last = Weights.now(trainer)
        if saves_checkpoints(trainer):
            with epoch_to_continue(trainer):
                path, exists = from_rank_zero(trainer, lambda: self._target(trainer))
                if not exists:
                    trainer.save_checkpoint(path)
            self._keep(path)

    def save_alone(self, trainer: Trainer) -> None:
        """Save the last weights after an error, on rank 0, without waiting for other ranks, which may have failed.

        Raises:
            RuntimeError: each rank holds a part of the weights only.
        """
        self.last = Weights.now(trainer)
        if not trainer.is_global_zero or not saves_checkpoints(trainer):
            return
        if not _ranks_hold_all_weights(trainer):
            raise RuntimeError(
                f"{type(trainer.strategy).__name__} needs all ranks to save, and some may have failed: the last "
                "weights are lost; save checkpoints often with ModelCheckpoint"
            )
        with epoch_to_continue(trainer):
            path, exists = self._target(trainer)
            if not exists:
                # `trainer.save_checkpoint` is the same and then waits for all ranks.
                checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
                trainer.strategy.save_checkpoint(checkpoint, path)
        self._keep(path)

    def file_of(self, weights: Weights) -> str | None:
        """The newest checkpoint that was saved from these weights; None if there is none."""
        if weights == self.last and self.file is not None:
            return self.file
        return next((path for path, saved in self._checkpoints() if weights.are_in(saved)), None)

    def _keep(self, path: str) -> None:
        self.file = path
        self._paths[path] = None

    def _target(self, trainer: Trainer) -> tuple[str, bool]:
        """A checkpoint of the last weights that a resume continues from exactly, and True; or a free path, and False."""
        self.note(trainer)
        assert self.last is not None
        current: Any = trainer.fit_loop.epoch_progress.current
        epochs: float = current.processed
        if trainer.max_epochs == -1 and trainer.num_training_batches == float("inf"):
            epochs = float("inf")  # the number of the epoch changes nothing
        for path, saved in self._checkpoints():
            full = "optimizer_states" in saved
            if full and _epochs(saved) <= epochs and self.last.are_in(saved):
                return path, True
        folders = [c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        return _free_path(str(next(filter(None, folders), self._folder / "checkpoints")), self.NAME), False

    def _checkpoints(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The files that are there, the newest first."""
        for path in reversed(self._paths):
            if (checkpoint := read_checkpoint(path)) is not None:
                yield path, checkpoint


def saves_checkpoints(trainer: Trainer) -> bool:
    """Whether the Trainer saves checkpoints: not with `enable_checkpointing=False` or `fast_dev_run`."""
    return bool(trainer.checkpoint_callbacks) and not trainer.fast_dev_run  # type: ignore[attr-defined]


def read_checkpoint(path: str) -> dict[str, Any] | None:
    """Map a local checkpoint of Lightning into memory; None if it is not there, remote or damaged."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError):
        return None
    known = isinstance(checkpoint, dict) and {"global_step", "state_dict", "loops"} <= checkpoint.keys()
    return checkpoint if known else None


def _ranks_hold_all_weights(trainer: Trainer) -> bool:
    return isinstance(trainer.strategy, DDPStrategy | SingleDeviceStrategy)


def _checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes; of a matrix, of its sums over rows and over columns, read as 64-bit integers.

    The sums wrap around, so that they depend on every bit. They are taken where the matrix is: a copy of wide weights on
    the host, and a CRC of all of it, would take seconds after each validation.
    """
    values = tensor.detach()
    if values.ndim > 1 and values.shape[-1] * values.element_size() % _WORD == 0:
        values = (
            values if values.device.type in ("cpu", "cuda") else values.cpu()
        )  # others may lack 64-bit integers
        if values.storage_offset() * values.element_size() % _WORD:
            values = values.clone()
        words = values.contiguous().flatten(0, -2).view(torch.int64)
        values = torch.cat([words.sum(0), words.sum(1)])
    return zlib.crc32(values.reshape(-1).cpu().contiguous().view(torch.uint8).numpy().data)


def _epochs(checkpoint: Mapping[str, Any]) -> int:
    """The number of epochs that a checkpoint counts as trained."""
    return int(checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])


@contextmanager
def epoch_to_continue(trainer: Trainer) -> Iterator[None]:
    """Count an epoch that a stop has cut short as begun, while checkpoints are made.

    Lightning counts it as trained when it stops, and would begin the next epoch after a resume.
    """
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress
    epochs: Any = trainer.fit_loop.epoch_progress
    whole = batches.is_last_batch or batches.current.ready == trainer.num_training_batches
    counted = not whole and epochs.current.processed == epochs.current.ready
    before = [(p, p.processed, p.completed) for p in (epochs.current, epochs.total)] if counted else []
    for progress, processed, _ in before:
        progress.processed = progress.completed = processed - 1
    try:
        yield
    finally:
        for progress, processed, completed in before:
            progress.processed, progress.completed = processed, completed


def _free_path(folder: str, name: str) -> str:
    """The path of a new checkpoint in a folder, which may be a URL: no file of another run is replaced."""
    files, _ = url_to_fs(folder)
    names = [f"{name}.ckpt", *(f"{name}-v{version}.ckpt" for version in range(1, 100_000))]
    return next(path for each in names if not files.exists(path := f"{folder.rstrip('/')}/{each}"))
