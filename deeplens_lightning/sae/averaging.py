"""Keep the averages of Lightning's weight averaging callbacks usable: counters are copied, decoder rows have norm 1.

In: `WeightAveraging`, `EMAWeightAveraging` or `StochasticWeightAveraging` among the callbacks of a Trainer. Out: averages
that can be validated, saved, exported and resumed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from deeplens_lightning.activation_data import callbacks_of
from deeplens_lightning.sae.dictionary import Dictionary
from deeplens_lightning.sae.forward import adopt_units


class ValidAverages(Callback):
    """Correct the averaged module after each update, and before each validation.

    Lightning averages every parameter and buffer, one number at a time. A mean of unit rows is shorter than 1, a mean of
    counters is no count, and buffers outside the state dict are not restored by a resume. Parameters stay averaged and
    are projected to their constraints; buffers are those of the module in training, among them BatchTopK's threshold,
    which is a running mean already.
    """

    def __init__(self) -> None:
        super().__init__()
        self._swapped = False
        self._in_units = True  # False before an import has units

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Average no buffers, and say so where `use_buffers` asks for it: there is no mean of counters and flags."""
        for callback in callbacks_of(trainer):
            if isinstance(callback, WeightAveraging) and callback._average_model is not None:
                if callback._average_model.use_buffers:
                    rank_zero_info(
                        f"{type(callback).__name__}(use_buffers=True) averages the weights; buffers, which are counters, "
                        "running means and the normalisation, are copied instead"
                    )
                callback._average_model.use_buffers = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let SWA install its schedule where a resume starts inside an epoch: Lightning skips the hook that does."""
        self._in_units = not _has_import(pl_module)
        if trainer.fit_loop.restarted_mid_epoch:
            for callback in callbacks_of(trainer):
                if isinstance(callback, StochasticWeightAveraging):
                    callback.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Correct SWA's update."""
        if self._in_units:
            _correct(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        *args: Any,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Correct the update of this step, before a checkpoint is saved."""
        if not self._in_units and not _has_import(pl_module):
            _follow_units(trainer, pl_module)
            self._in_units = True
        if self._in_units:
            _correct(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Correct an update at the end of an epoch."""
        _correct(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy buffers that a resume did not restore, before Lightning exchanges the modules' weights."""
        for average in _averages(trainer):
            _copy_buffers(pl_module, average)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Note that the module in training holds the averages now."""
        self._swapped = True

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Note that it holds its own weights again."""
        self._swapped = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """After an exception inside validation, return the weights to their modules, before a checkpoint is saved."""
        if self._swapped:
            self._swapped = False
            for callback in callbacks_of(trainer):
                if isinstance(callback, WeightAveraging):
                    callback.on_validation_epoch_end(trainer, pl_module)


def valid_averages(trainer: Trainer) -> list[Callback]:
    """The Trainer's weight averaging callbacks, which move to the end of its list, and a `ValidAverages`; empty if none.

    At the end of the list, they return the weights of the module in training only after every other callback has
    measured the averages.
    """
    found = [
        callback
        for callback in callbacks_of(trainer)
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging)
    ]
    return [*found, ValidAverages()] if found else []


def _averages(trainer: Trainer) -> Iterator[nn.Module]:
    """The averaged modules; Lightning has no public name for them."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, WeightAveraging) and callback._average_model is not None:
            yield callback._average_model.module
        elif isinstance(callback, StochasticWeightAveraging) and callback._average_model is not None:
            yield callback._average_model


def _has_import(module: nn.Module) -> bool:
    """Whether an SAE is an import whose units the first batch will measure. Waits for the device."""
    return any(
        bool(part.initialized) and not part.write.is_measured and not part.activity.tokens_seen
        for part in module.modules()
        if isinstance(part, Dictionary)
    )


def _follow_units(trainer: Trainer, pl_module: LightningModule) -> None:
    """Rescale averages that still hold imports, because none is updated yet, to the units that were measured."""
    for callback in callbacks_of(trainer):
        average = callback._average_model if isinstance(callback, WeightAveraging) else None
        if average is None or average.n_averaged:
            continue
        for source, target in zip(pl_module.modules(), average.module.modules(), strict=True):
            if not isinstance(source, Dictionary) or not isinstance(target, Dictionary):
                continue
            if target.initialized and not target.write.is_measured:
                target.read.unit.copy_(source.read.unit)
                target.write.unit.copy_(source.write.unit)
                adopt_units(target.weights, target.activation, target.read, target.write)


def _correct(trainer: Trainer, pl_module: LightningModule) -> None:
    for average in _averages(trainer):
        _copy_buffers(pl_module, average)
        for part in average.modules():
            if isinstance(part, Dictionary):
                part.project()


@torch.no_grad()
def _copy_buffers(module: nn.Module, average: nn.Module) -> None:
    for source, target in zip(module.buffers(), average.buffers(), strict=True):
        target.copy_(source)
