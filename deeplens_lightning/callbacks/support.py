"""Helpers for callbacks: evaluation mode, raw rows of a batch, intervals of steps, places of files and metrics.

A callback that runs the SAE in the middle of training must not change the training: no gradient, no different
train/eval flag, no number drawn from the global random generators, no hook left on a module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from deeplens_lightning.activation_data import ActivationData, activation_data, callbacks_of
from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.model.hook_points import HookPoint
from deeplens_lightning.normalization import Scaling
from deeplens_lightning.reporting.run_folder import run_folder

T = TypeVar("T")


def check_widths(points: Sequence[HookPoint], data: ActivationData, callback: str) -> None:
    """Check that a model which a callback runs has rows as wide as those of the data module.

    Args:
        points: hook points of the model.
        data: the data module.
        callback: name of the callback, for the error message.

    Raises:
        ValueError: a width differs.
    """
    for point in points:
        served = data.d_in.get(point.name) if isinstance(data.d_in, Mapping) else data.d_in
        if served is not None and served != point.d_in:
            raise ValueError(
                f"{callback}: the rows of the data module are {served} wide, and those of {point.name} in its model are "
                f"{point.d_in} wide: give hf_model= the model that the rows were computed with"
            )


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Run a block in evaluation mode without gradients, then restore the train/eval flag of every submodule."""
    training = [child for child in module.modules() if child.training]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for child in training:
            child.training = True


def exclusive_model(data: ActivationData) -> AbstractContextManager[Any]:
    """Hold up the data module's forward passes until the context ends; for running or loading a language model.

    A thread may compute rows meanwhile. A model that was handed in may be the one that a callback runs; and while
    transformers loads weights, the default dtype of the process is another one.
    """
    frozen: FrozenModel | None = data.model
    return nullcontext() if frozen is None else frozen.exclusive()


class RawRows:
    """Undo the data module's normalisation of batches; make one for each fit."""

    def __init__(self) -> None:
        self._scalings: dict[str, Scaling | None] = {}  # None where rows are raw already

    def of(self, trainer: Trainer, batch: Any, hooks: Sequence[str]) -> dict[str, Tensor]:
        """Raw rows of a batch, `(batch, d_in)` by hook point.

        Args:
            trainer: the Trainer whose data module served the batch.
            batch: the batch as `training_step` received it: a Tensor, or a dict of Tensors by hook point.
            hooks: hook points to return. For a Tensor, give one name; it becomes the key of the result.

        Raises:
            TypeError: the batch is neither a Tensor nor a dict of Tensors.
        """
        rows = {}
        for hook in hooks:
            x = batch[hook] if isinstance(batch, Mapping) else batch
            if not isinstance(x, Tensor):
                raise TypeError(
                    f"a batch must be a Tensor (batch, d_in) or a dict of them, got {type(x).__name__}"
                )
            if hook not in self._scalings:
                self._scalings[hook] = _scaling(activation_data(trainer), hook)
            s = self._scalings[hook]
            rows[hook] = x if s is None else s.undo(x)
        return rows


def _scaling(data: ActivationData, hook: str) -> Scaling | None:
    """Normalisation of a hook point; None where it leaves rows unchanged."""
    scaling = data.scaling
    s = scaling.get(hook) if isinstance(scaling, Mapping) else scaling
    return None if s is None or s.is_identity else s


def batch_rows(batch: Any) -> int:
    """Number of rows in a batch; one row is the activation vector of one token."""
    rows = next(iter(batch.values())) if isinstance(batch, Mapping) else batch
    return len(rows)


def from_rank_zero(trainer: Trainer, make: Callable[[], T]) -> T:
    """Call a function on rank 0 and return its result on every rank. A collective: every rank calls it.

    Raises:
        Exception: on rank 0, the error of `make`.
        RuntimeError: on the other ranks, if `make` failed; the message has its error.
    """
    value: Any = None
    failure: Exception | None = None
    if trainer.is_global_zero:
        try:
            value = make()
        except Exception as error:  # noqa: BLE001  raised again below, when the other ranks know of it
            failure = error
    told = None if failure is None else f"{type(failure).__name__}: {failure}"
    shared: tuple[T, str | None] = trainer.strategy.broadcast((value, told))
    if failure is not None:
        raise failure
    if shared[1] is not None:
        raise RuntimeError(f"rank 0 failed with {shared[1]}")
    return shared[0]


def log_every(trainer: Trainer) -> int:
    """Optimizer steps between two logs, the Trainer's `log_every_n_steps`; 0 means that nothing is logged."""
    return int(trainer.log_every_n_steps)  # type: ignore[attr-defined]


class Every:
    """Decide at which optimizer steps a callback acts: every `n`-th one, once.

    With gradient accumulation several batches share one optimizer step; only the first of them counts.

    Args:
        n: optimizer steps between two actions, at least 1.
        name: name of the argument that `n` was given as, for the error message.

    Raises:
        ValueError: `n` is below 1.
    """

    def __init__(self, n: int, name: str = "every_n_steps") -> None:
        if n < 1:
            raise ValueError(f"{name}={n} must be at least 1")
        self.n = n
        self._last = 0

    def due(self, step: int) -> bool:
        """Return True the first time that `step`, the Trainer's global step, is a given multiple of `n`."""
        due = step > 0 and step % self.n == 0 and step != self._last
        if due:
            self._last = step
        return due


@runtime_checkable
class WritesFiles(Protocol):
    """A callback that lists the files and folders it wrote; `FitSummary` prints them.

    Attributes:
        written: paths, each once, in the order in which they were first written.
    """

    written: list[Path]


def add_written(written: list[Path], path: Path) -> None:
    """Append a path to the list of written files unless it is listed already."""
    if path not in written:
        written.append(path)


def folder_name(sae: str) -> str:
    """The name of an SAE of a grid as the name of a folder."""
    return sae.replace("/", "_")


class SaeObserver(Callback):
    """Base of the callbacks that measure one SAE: where each writes, and the names of its metrics.

    With `sae`, the name of the SAE is in both, so that several such callbacks measure the SAEs of a grid side by side.

    Args:
        place: name of its folder or file in the run's folder.
        sae: name of one SAE of a module that trains several; None for the first.

    Attributes:
        place: the name, followed by `-<sae>` if `sae` is given.
        sae: as given.
        written: files and folders written, each once.
    """

    def __init__(self, place: str, sae: str | None) -> None:
        self.place = place if sae is None else f"{place}-{folder_name(sae)}"
        self.sae = sae
        self.written: list[Path] = []

    def metric(self, name: str) -> str:
        """The name of a metric; `/<sae>` follows if `sae` was given, as in the metrics of a grid."""
        return name if self.sae is None else f"{name}/{self.sae}"

    def find_place(self, trainer: Trainer) -> Path:
        """The path of `place` in the run's folder. A collective: every rank calls it.

        Raises:
            ValueError: another callback of the Trainer has the same place.
        """
        callbacks = callbacks_of(trainer)
        same = [c for c in callbacks if isinstance(c, SaeObserver) and c.place == self.place]
        if len(same) > 1:
            raise ValueError(
                f"{' and '.join(type(c).__name__ for c in same)} would both write to {self.place} in the run's folder: "
                "give each the name of another SAE as sae=, or leave one of them out"
            )
        return run_folder(trainer) / self.place
