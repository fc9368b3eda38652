"""What every callback here shares: looking at a training run without touching it.

Reading an SAE in mid-training must leave no trace: no gradient, no changed train/eval flag, no
random number drawn, no hook. These helpers keep that in one place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor, nn

from deeplens_lightning.normalization import Scaling


@contextmanager
def observing(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every submodule's flag is what it was."""
    training = [child for child in module.modules() if child.training]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for child in training:
            child.training = True


def datamodule_of(trainer: Trainer) -> LightningDataModule | None:
    """The data module of this run, if there is one."""
    return cast("LightningDataModule | None", getattr(trainer, "datamodule", None))


def hook_names(trainer: Trainer) -> tuple[str, ...]:
    """Canonical names of the hook points that batches hold; empty where the data module does not say."""
    return tuple(getattr(datamodule_of(trainer), "hook_names", ()))


def raw_rows(trainer: Trainer, batch: Any, hooks: Sequence[str]) -> dict[str, Tensor]:
    """Rows `(batch, d_in)` by hook point, with the data module's scaling undone.

    Args:
        trainer: whose data module served the batch.
        batch: as `training_step` got it, a Tensor or a dict by hook point.
        hooks: which hook points; one name is enough for a Tensor, whatever it is.
    """
    scaling = getattr(datamodule_of(trainer), "scaling", None)
    rows = {}
    for hook in hooks:
        x = batch[hook] if isinstance(batch, Mapping) else batch
        if not isinstance(x, Tensor):
            raise TypeError(
                f"a batch must be a Tensor (batch, d_in) or a dict of them, got {type(x).__name__}"
            )
        s = scaling.get(hook) if isinstance(scaling, Mapping) else scaling
        rows[hook] = s.undo(x) if isinstance(s, Scaling) and not s.is_identity else x
    return rows


def batch_rows(batch: Any) -> int:
    """Rows of a batch: activation vectors, one per token."""
    rows = next(iter(batch.values())) if isinstance(batch, Mapping) else batch
    return len(rows)


def log_every(trainer: Trainer) -> int:
    """Steps between two logs of this run; 0 for none."""
    return int(getattr(trainer, "log_every_n_steps", 0))


class Every:
    """True once for every `n` optimizer steps, whatever gradients are accumulated over."""

    def __init__(self, n: int, name: str = "every_n_steps") -> None:
        if n < 1:
            raise ValueError(f"{name}={n} must be at least 1")
        self.n = n
        self._last = 0

    def due(self, step: int) -> bool:
        """Whether `step` (the Trainer's global step) is a multiple of n not met before."""
        due = step > 0 and step % self.n == 0 and step != self._last
        if due:
            self._last = step
        return due


def remember(written: list[Path], path: Path) -> None:
    """Note a file or folder for the summary, once."""
    if path not in written:
        written.append(path)
