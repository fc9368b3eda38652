"""Lightning's hooks: train one dictionary, or several side by side, on the batches of a data module.

In: a Trainer and its data module, whose batches are normalised rows: `(batch, d_in)`, or a dict of them by
hook point. Out: trained dictionaries, which read raw activations. There is one optimizer with a parameter group
for each dictionary, so that `max_steps` counts batches; each dictionary is initialised, clipped, projected and
measured on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from typing_extensions import Self

from deeplens_lightning.activation_data import activation_data, data_parallel_ranks
from deeplens_lightning.disk.torch_files import check_checkpoint_file
from deeplens_lightning.preemption import default_preemption
from deeplens_lightning.sae.averaging import valid_averages
from deeplens_lightning.sae.checkpoint_compatibility import (
    check_checkpoint,
    continue_learning_rates,
    describe,
    read_trained_on,
)
from deeplens_lightning.sae.dictionary import Dictionary
from deeplens_lightning.sae.interrupted_validation import repeat_interrupted_validation
from deeplens_lightning.sae.metrics import HeldOutMetrics
from deeplens_lightning.sae.monitors import check_monitors, warn_of_missing_metrics
from deeplens_lightning.sae.nonfinite import Describe, NonFiniteRows
from deeplens_lightning.sae.prediction import SparseLatents, active_latents
from deeplens_lightning.sae.run_length import RunLength, plan
from deeplens_lightning.sae.schedule import WarmupDecay, check_eps
from deeplens_lightning.sae.tuning import adopt_learning_rates, begin_epoch_after_tuner
from deeplens_lightning.types import Batch, Provenance

REFUSED = {
    FSDPStrategy: "splits the decoder over ranks, and the norm of its rows needs whole rows",
    DeepSpeedStrategy: "clips the gradients of all SAEs together and skips the clipping of each",
}


class DictionaryTraining(LightningModule):
    """Lightning's hooks for training one or several dictionaries; base of the modules that do."""

    _held_out: dict[str, HeldOutMetrics]  # not a submodule: `bf16-true` must not convert its sums
    _nonfinite_predictions: NonFiniteRows
    _length = RunLength(steps=None, batches=None)
    _resumed_step: int | None = None
    _monitors_checked = False

    @property
    def dictionaries(self) -> Mapping[str, Dictionary]:
        """The dictionaries in training by name; a single one has the name ""."""
        raise NotImplementedError

    @_restricted_classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:  # noqa: N805
        """Make a module from a checkpoint, as `LightningModule.load_from_checkpoint` does.

        Raises:
            ValueError: the file is damaged; every byte is compared with the CRCs in it.
        """
        if isinstance(checkpoint_path, str | Path):
            check_checkpoint_file(checkpoint_path)
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def configure_callbacks(self) -> list[Callback]:
        """Save when a cluster ends the job: a fit on several ranks has a `Preemption` unless the Trainer has one.

        With weight averaging, a `ValidAverages` keeps the averages usable.
        """
        if self.trainer.state.fn != TrainerFn.FITTING:
            return []
        return [*default_preemption(self.trainer), *valid_averages(self.trainer)]

    def setup(self, stage: str) -> None:  # noqa: ARG002
        """Forget the checkpoint of an earlier fit."""
        self._resumed_step = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the settings of each SAE and what it was trained on, by name."""
        checkpoint.update(describe(self.dictionaries))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what the SAEs were trained on; a resumed fit also repeats an interrupted validation.

        A resumed fit keeps the learning rates of the checkpoint, and warns if others were given.

        Raises:
            ValueError: the checkpoint holds SAEs with other names or settings, or is damaged.
        """
        repeat_interrupted_validation(checkpoint)
        saes = self.dictionaries
        stage = None if self._trainer is None else self.trainer.state.fn
        check_checkpoint({name: sae.settings for name, sae in saes.items()}, checkpoint, stage)
        for name, trained_on in read_trained_on(checkpoint, saes).items():
            saes[name].trained_on = trained_on
        if (
            stage == TrainerFn.FITTING and self.trainer.train_dataloader is None
        ):  # else a tuner restores the state before its trials
            self._resumed_step = checkpoint["global_step"]
            continue_learning_rates(saes, checkpoint)

    def on_fit_start(self) -> None:
        """Read the data module's normalisation, which is final by now."""
        self._prepare()
        data = activation_data(self.trainer)
        for sae in self.dictionaries.values():
            names = sae.read.hooks if "" not in sae.read.hooks else data.hook_names
            if isinstance(data.hf_model, str):  # a model that was handed in has no name to record
                sae.trained_on["model_name"] = data.hf_model
            if joined := ",".join(names):
                sae.trained_on["hook_name"] = joined
        adopt_learning_rates(self.trainer, [sae.lr for sae in self.dictionaries.values()])

    def on_train_start(self) -> None:
        """Plan the schedules, and say so if their length is not known."""
        self._monitors_checked = False
        self._plan()
        if self._length.note is not None:
            rank_zero_info(self._length.note)

    def on_train_epoch_start(self) -> None:
        """Take over what a tuner or another callback changed before this epoch, and check what callbacks monitor."""
        adopt_learning_rates(self.trainer, [sae.lr for sae in self.dictionaries.values()])
        begin_epoch_after_tuner(self.trainer, self._resumed_step)
        self._plan()
        check_monitors(self.trainer, [_log_name("train", "fvu", name) for name in self.dictionaries])

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        """Initialise new dictionaries from the first batch; restored ones are initialised already."""
        served = len(batch if isinstance(batch, Tensor) else next(iter(batch.values())))
        # An epoch's last batch may be shorter, and on some ranks only.
        rows = activation_data(self.trainer).batch_size or served
        everywhere = rows * data_parallel_ranks(self.trainer)
        for sae in self.dictionaries.values():
            sae.initialize_from(batch)
            sae.planned_tokens = self._length.batches * everywhere if self._length.batches else None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002
        """The sum of the dictionaries' losses on a served batch; dictionaries share no parameters."""
        progress = min(1.0, self.global_step / self._length.steps) if self._length.steps else 1.0
        describe = self._describe(batch, f"step {self.global_step}")
        steps = {name: sae.step(batch, progress, describe) for name, sae in self.dictionaries.items()}
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every > 0 and (self.global_step + 1) % every == 0:
            for name, sae in self.dictionaries.items():
                sae.check_rows()
                for metric, value in sae.scalars(steps[name]).items():
                    in_progress_bar = not name and metric in ("fvu", "l0")
                    self.log(_log_name("train", metric, name), value, prog_bar=in_progress_bar)
        losses = [step.loss for step in steps.values()]
        return torch.stack(losses).sum() if len(losses) > 1 else losses[0]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """Check once, at a step that has logged, whether callbacks monitor what training does not log."""
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if (
            not self._monitors_checked
            and self.trainer.global_step
            and not (every and self.trainer.global_step % every)
        ):
            self._monitors_checked = True
            warn_of_missing_metrics(self.trainer)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam, fused where possible, with warm-up and decay over the planned steps.

        Raises:
            ValueError: the Trainer's strategy is FSDP or DeepSpeed, or `eps` is 0 in the precision of the weights.
        """
        for strategy, reason in REFUSED.items():
            if isinstance(self.trainer.strategy, strategy):
                raise ValueError(f'{strategy.__name__} {reason}: give strategy="ddp"')
        saes = self.dictionaries.values()
        for sae in saes:
            check_eps(sae.optimization.eps, sae.W_enc.dtype)
        plugin = self.trainer.precision_plugin
        scales_gradients = isinstance(plugin, MixedPrecision) and plugin.scaler is not None
        fused = self.device.type in ("cpu", "cuda") and not scales_gradients
        optimizer = torch.optim.Adam([sae.parameter_group() for sae in saes], fused=fused)
        schedule = WarmupDecay(optimizer, [sae.optimization for sae in saes])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Any,  # noqa: ARG002
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients of each dictionary on their own: a joint norm would couple them."""
        for sae in self.dictionaries.values():
            sae.prepare_gradients(gradient_clip_val, gradient_clip_algorithm)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Step, then restore the constraints: checkpoints are saved before this module's `on_train_batch_end`."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        for sae in self.dictionaries.values():
            sae.project()

    def on_train_end(self) -> None:
        """Raise an error on all ranks if rows with NaN or infinity came after the last step that logged."""
        for sae in self.dictionaries.values():
            sae.check_rows()

    def on_validation_epoch_start(self) -> None:
        """Start new held-out metrics."""
        if self.trainer.state.fn != TrainerFn.FITTING:
            self._prepare()
        self._held_out = {name: sae.new_metrics() for name, sae in self.dictionaries.items()}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a served batch of held-out rows."""
        describe = self._describe(batch, f"held-out batch {batch_idx}")
        for name, sae in self.dictionaries.items():
            sae.measure(batch, self._held_out[name], describe)

    def on_validation_epoch_end(self) -> None:
        """Log held-out metrics over all rows of all ranks.

        Raises:
            NonFiniteRowsError: a row of any rank holds NaN or infinity, and `on_nonfinite` is "stop".
        """
        stage = "test" if self.trainer.testing else "val"
        for name, metrics in self._held_out.items():
            stop = self.dictionaries[name].on_nonfinite == "stop"
            if stop:
                metrics.nonfinite.check()
            figures = metrics.compute()
            if stop:  # then it is 0
                figures.pop("nonfinite_rows", None)
            if self.trainer.barebones:  # nothing is logged, and Lightning would warn at each metric
                continue
            for metric, value in figures.items():
                self.log(
                    _log_name(stage, metric, name),
                    value.float().cpu(),
                    prog_bar=not name and metric == "fvu",
                    sync_dist=True,  # already equal on all ranks, but Lightning warns without it
                )

    def on_test_epoch_start(self) -> None:
        """Start new held-out metrics."""
        self.on_validation_epoch_start()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a served batch of held-out rows."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log held-out metrics over all rows of all ranks, under "test/"."""
        self.on_validation_epoch_end()

    def on_predict_start(self) -> None:
        """Read the data module's normalisation."""
        self._prepare()
        self._nonfinite_predictions = NonFiniteRows("predicted rows")

    def predict_step(self, batch: Batch, batch_idx: int) -> SparseLatents | dict[str, SparseLatents]:
        """The active latents of a served batch, on the CPU; a dict by name of the dictionary in a grid."""
        provenance = activation_data(self.trainer).provenance(batch)
        found = {}
        for name, sae in self.dictionaries.items():
            found[name], bad = active_latents(sae, batch, provenance)
            if sae.on_nonfinite == "stop":
                describe = self._describe(batch, f"batch {batch_idx}")
                self._nonfinite_predictions.add(bad, len(bad), describe)
        return found.get("", found)

    def on_predict_epoch_end(self) -> None:
        """Raise an error on all ranks if a row of any rank held NaN or infinity, and `on_nonfinite` is "stop"."""
        self._nonfinite_predictions.check()

    def _plan(self) -> None:
        self._length = plan(self.trainer, [sae.optimization for sae in self.dictionaries.values()])

    def _prepare(self) -> None:
        data = activation_data(self.trainer)
        for sae in self.dictionaries.values():
            if data.d_in is not None and sae.d_in != data.d_in:
                raise ValueError(
                    f"the data serves d_in={data.d_in}, but the SAE was built for {sae.d_in}: "
                    f"give d_in={data.d_in}"
                )
            sae.prepare(data.scaling)

    def _describe(self, batch: Batch, words: str) -> Describe:
        """A description of a row of the batch, with its place in the text; `words` say which batch it is."""
        return partial(_describe_row, words, activation_data(self.trainer).provenance_later(batch))


def _log_name(stage: str, metric: str, dictionary: str) -> str:
    """Name of a logged metric, such as "val/fvu" or, for one dictionary of several, "val/fvu/k=32"."""
    return f"{stage}/{metric}/{dictionary}" if dictionary else f"{stage}/{metric}"


def _describe_row(words: str, find: Callable[[], Provenance | None], row: int) -> str:
    words = f"{words}, first is row {row}"
    found = find()
    if found is None:
        return words
    return (
        f"{words}: document {int(found.document_index[row])}, position {int(found.position[row])}, "
        f"token {int(found.token_id[row])}"
    )
