"""The mutable state of a data module: the opened source, measured statistics, the training loader and its position.

In: settings, and a Trainer if there is one. Out: data loaders, and the state for a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from deeplens_lightning.activation_data import NotSetUpError
from deeplens_lightning.disk.torch_files import check_checkpoint_file
from deeplens_lightning.distributed import on_every_rank
from deeplens_lightning.stream.cached_source import CachedActivations, CachedSettings
from deeplens_lightning.stream.checkpoint import DataState, check_fingerprint
from deeplens_lightning.stream.live_activations import LiveActivations
from deeplens_lightning.stream.live_source import LiveSettings
from deeplens_lightning.stream.loader import ActivationLoader, finish
from deeplens_lightning.stream.measured_statistics import Statistics
from deeplens_lightning.stream.resuming import continue_epochs, continue_from, refuse_resume
from deeplens_lightning.stream.settings import DataSettings
from deeplens_lightning.stream.trained_batches import (
    SeenBatches,
    TrainedBatches,
    is_fitting,
    trainer_ends_epochs,
)
from deeplens_lightning.stream.validation_set import HeldOutRows, RowsLoader
from deeplens_lightning.types import Batch, Placement

CUDA_PREFETCH = 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": None}


class Serving:
    """Open a source of activations, make its data loaders, and save and restore the position in the data.

    Args:
        settings: the settings of the data module.

    Attributes:
        source: the settings of the source of activations, live or cached.
        opened: the opened source; None before `open` and after `close`.
        seen: the provenance of the batches that are in memory.
    """

    def __init__(self, settings: DataSettings) -> None:
        self.settings = settings
        self.source = LiveSettings(settings) if settings.shards is None else CachedSettings(settings)
        self.opened: LiveActivations | CachedActivations | None = None
        self.seen = SeenBatches()
        self._trained = TrainedBatches()
        self._loader: ActivationLoader | None = None
        self._rows: RowsLoader | None = None
        self._statistics: Statistics | None = None
        self._statistics_loaded = False
        self._state: DataState | None = None
        self._saved: DataState | None = None
        self._trainer: Trainer | None = None

    @property
    def activations(self) -> LiveActivations | CachedActivations:
        """The opened source.

        Raises:
            NotSetUpError: `open` was not called.
        """
        if self.opened is None:
            raise NotSetUpError('nothing is loaded: call setup("fit") on the data module first')
        return self.opened

    @property
    def loader(self) -> ActivationLoader | None:
        """The training loader; None before `training` was called."""
        return self._loader

    def open(self, placement: Placement) -> None:
        """Load text, tokenizer and model, or list the shards; does nothing if they are open for the same placement.

        A collective operation if there are several ranks.

        Args:
            placement: rank and devices of this process.

        Raises:
            RankError: it failed on another rank.
            ValueError: the ranks found different ways to keep segments apart; with other errors of the source.
        """
        if self.opened is not None:
            if replace(self.opened.placement, progress=placement.progress) == placement:
                return
            self._close_loader()
            self.opened.close()
        else:
            self._state = None
            if self._statistics_loaded:
                self._statistics, self._statistics_loaded = None, False
        ways = on_every_rank(lambda: self._open(placement), placement)
        if len(set(ways)) > 1:
            raise ValueError(
                f"the ranks keep segments apart in different ways, by rank: {', '.join(map(str, ways))}; give one of "
                "them as model_options.isolation"
            )
        if self._state is not None:
            self._keep_choices(self._state)

    def _open(self, placement: Placement) -> str | None:
        """Open the source; returns how the model keeps segments apart."""
        self.opened = self.source.open(placement)
        return self.opened.model.isolation if isinstance(self.opened, LiveActivations) else None

    def measured(self) -> Statistics:
        """Normalisation and norm limits, measured at the first call.

        Raises:
            NotSetUpError: they are not measured yet and `open` was not called.
        """
        if self._statistics is None:
            self._statistics = self.activations.measure()
        return self._statistics

    def training(
        self, trainer: Trainer | None, batch_size: int, max_tokens: int | None, name: str
    ) -> ActivationLoader:
        """The training loader, which continues after the last batch that was trained on.

        A new one is made if the batch size has changed, or if the Trainer went back to a checkpoint, as tuners do.

        Args:
            trainer: the Trainer; None without one.
            batch_size: rows per batch.
            max_tokens: rows per Trainer epoch, the sum over all ranks; None for whole data epochs.
            name: name of the data module's class, for messages.

        Raises:
            ValueError: the Trainer resumes from a checkpoint that has no state of this data module.
        """
        self._trainer = trainer
        if self._loader is not None:
            if self._trained.rewound(trainer, self._loader.served):
                if self._trained.saved_at(trainer):
                    self._state = self._saved
            elif self._loader.batch_size == batch_size:
                return self._loader
            else:
                self._state = self._now(self._loader.batch_size)
        opened, given = self.activations, self.settings
        if not given.resume_anyway and self._state is None:
            refuse_resume(trainer, name)
        if trainer is not None and is_fitting(trainer) and trainer.ckpt_path:
            continue_epochs(trainer)
        statistics, placement = self.measured(), opened.placement
        position = self._state.position if self._state is not None else None
        same = position is not None and position.batch_size == batch_size
        saved_rows = self._state.buffer_rows if self._state is not None and same else None
        stream = opened.stream(batch_size, statistics, saved_rows)
        automatic = CUDA_PREFETCH if placement.batch_device.type == "cuda" else 0
        self._close_loader()
        self._loader = ActivationLoader(
            stream,
            scalings=statistics.scalings,
            dtype=DTYPES[given.buffer_options.dtype],
            batch_size=batch_size,
            batches_per_epoch=max_tokens // (batch_size * placement.ranks) if max_tokens else None,
            known_length=opened.known_batches(batch_size),
            prefetch=automatic if given.prefetch is None else given.prefetch,
            placement=placement,
            unprocessed=self._unprocessed,
            seen=self.seen.remember,
            warn=rank_zero_warn,
            endless=lambda: trainer_ends_epochs(self._trainer),
            overfit=trainer is not None and bool(trainer.overfit_batches),  # type: ignore[attr-defined]
        )
        if self._state is not None:
            continue_from(self._state, self._loader, trainer, placement, given.resume_anyway)
        return self._loader

    def validation(self, batch_size: int) -> RowsLoader:
        """The loader of the validation set.

        Args:
            batch_size: rows per batch.
        """
        return self._held_out(lambda: self.activations.heldout, batch_size)

    def test(self, batch_size: int) -> RowsLoader:
        """The loader of the test set.

        Args:
            batch_size: rows per batch.
        """
        return self._held_out(lambda: self.activations.test, batch_size)

    def before_move(self, batch: Batch, training: bool) -> None:
        """Note the provenance of a batch that Lightning is about to move to a device; `seen.after_move` stores it.

        Args:
            batch: the batch, which a precision plugin may have cast to a new tensor.
            training: whether it is a batch of the training loader.
        """
        loader = self._loader if training else self._rows
        origins = None
        if isinstance(loader, ActivationLoader):
            origins = loader.origins()
        elif loader is not None:
            origins = loader.origins(batch)
        self.seen.before_move(batch, origins)

    def sync(self) -> None:
        """Save the rows of `write_shards` that were computed so far, on every rank; call it before saving a checkpoint.

        A collective with `write_shards`: rank 0 must not save a checkpoint that counts rows which another rank would
        lose if it were killed.
        """
        if self._loader is not None and self.settings.write_shards is not None:
            on_every_rank(self._loader.stream.sync, self.activations.placement)

    def state(self, batch_size: int) -> DataState | None:
        """The state for a checkpoint: the position after the last batch trained on, and the fingerprint of the data."""
        self._saved = self._now(batch_size)
        self._trained.save(self._trainer)
        return self._saved

    def _now(self, batch_size: int) -> DataState | None:
        position = self._loader.position() if self._loader is not None else None
        if self.opened is None or (position is None and self._state is not None):
            return self._state
        return DataState(
            fingerprint=self._fingerprint(batch_size),
            position=position,
            buffer_rows=self._loader.stream.buffer_rows if self._loader is not None else None,
            statistics=self._statistics,
        )

    def resume(self, saved: dict[str, Any], trainer: Trainer | None, batch_size: int) -> None:
        """Restore the normalisation from a checkpoint and, for training, the position in the data.

        Args:
            saved: the state in the checkpoint.
            trainer: the Trainer; None without one.
            batch_size: rows per batch of this run.

        Raises:
            ValueError: the checkpoint was taken on other data (the message lists the differences), by a release with
                another version of the state, or its file is damaged.
        """
        if trainer is not None:  # Lightning has loaded the file, without a look at its CRCs
            check_checkpoint_file(trainer.ckpt_path)
        state = DataState.from_state(saved)
        self._keep_choices(state)
        fitting = trainer is None or is_fitting(trainer)
        if fitting and not self.settings.resume_anyway:
            # A tuner may change it before the first batch, and where it restores a checkpoint inside a fit.
            unused = ("batch_size",) if state.position is None or self._loader is not None else ()
            check_fingerprint(state.fingerprint, self._fingerprint(batch_size), unused)
        state.check_widths(self.source.widths)
        if state.statistics is not None:
            self._statistics, self._statistics_loaded = state.statistics, True
        if fitting:
            here = self._state.position if self._state is not None else None
            self._state = state
            # After a tuner the Trainer may hold a new loader, which must stay the one whose position is saved.
            if here != state.position or not self._untouched(trainer):
                self._close_loader()

    def close(self, batch_size: int) -> None:
        """Free model, buffer, thread and rows, also if saving the last rows fails; the position in the data is kept."""
        with ExitStack() as released:  # the last one first
            if self.opened is not None:
                released.callback(self.opened.close)
            released.callback(self._forget)
            if self._loader is not None:
                released.callback(self._loader.stream.close)
                released.callback(self._loader.close)
                self._loader.stream.sync()
            self._state = self.state(batch_size)

    def _forget(self) -> None:
        self._loader = self._rows = self.opened = None

    def _keep_choices(self, state: DataState) -> None:
        """Keep what settings of `auto` chose in the run of a checkpoint."""
        if isinstance(self.opened, LiveActivations):
            self.opened = self.opened.continued(state.fingerprint)

    def _fingerprint(self, batch_size: int) -> dict[str, str]:
        return self.activations.fingerprint() | {
            "batch_size": str(batch_size),
            "normalize": self.settings.normalize,
            "max_norm_ratio": str(self.settings.buffer_options.max_norm_ratio),
        }

    def _held_out(self, rows: Callable[[], HeldOutRows], batch_size: int) -> RowsLoader:
        self._rows = RowsLoader(rows, batch_size, self._finish, self.seen.remember)
        return self._rows

    def _finish(self, rows: dict[str, Tensor]) -> Batch:
        return finish(rows, self.measured().scalings, DTYPES[self.settings.buffer_options.dtype])

    def _unprocessed(self) -> int:
        loader = self._loader
        return self._trained.unprocessed(self._trainer, loader.served) if loader is not None else 0

    def _untouched(self, trainer: Trainer | None) -> bool:
        """Whether there is a loader that no batch was trained on from."""
        loader = self._loader
        if loader is None or self._trained.rewound(trainer, loader.served):
            return False
        return loader.served == self._trained.unprocessed(trainer, loader.served)

    def _close_loader(self) -> None:
        if self._loader is not None:
            self._loader.close()
            self._loader.stream.close()
        self._loader = None
