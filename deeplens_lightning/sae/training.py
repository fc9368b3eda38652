"""Lightning's hooks for one dictionary or several that train side by side on the same batches.

In: a Trainer and its data module. Out: one optimizer with a parameter group for each dictionary, so
that `max_steps` counts batches, and each is initialised, clipped, projected and measured on its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from deeplens_lightning.distributed import world_size
from deeplens_lightning.sae.metrics import HeldOutMetrics
from deeplens_lightning.sae.schedule import lr_factor, planned_steps
from deeplens_lightning.sae.units import Batch

if TYPE_CHECKING:
    from deeplens_lightning.sae.module import SparseAutoencoder


class DictionaryTraining(LightningModule):
    """Base of `SparseAutoencoder` and `SparseAutoencoderGrid`."""

    _held_out: dict[str, HeldOutMetrics]
    _planned_steps: int | None = None

    @property
    def dictionaries(self) -> dict[str, SparseAutoencoder]:
        """What trains, by name; a single one has the empty name."""
        raise NotImplementedError

    def on_fit_start(self) -> None:
        """Read the plan and the data module's normalisation, both final by now."""
        self._planned_steps = planned_steps(self.trainer)
        self._prepare()
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        for sae in self.dictionaries.values():
            names = sae.read.hooks if "" not in sae.read.hooks else getattr(data, "hook_names", ())
            known = {"model_name": getattr(data, "hf_model", None), "hook_name": ",".join(names) or None}
            sae.trained_on |= {name: value for name, value in known.items() if isinstance(value, str)}

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        """Initialise new dictionaries from the first batch; restored ones have been."""
        rows = len(batch if isinstance(batch, Tensor) else next(iter(batch.values())))
        rows_per_step = rows * world_size() * self.trainer.accumulate_grad_batches
        for sae in self.dictionaries.values():
            sae.initialize_from(batch)
            sae.planned_tokens = self._planned_steps * rows_per_step if self._planned_steps else None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002
        """The sum of the dictionaries' losses on a batch of served rows; their gradients do not meet."""
        progress = min(1.0, self.global_step / self._planned_steps) if self._planned_steps else 1.0
        steps = {
            name: sae.step(batch, progress, self._describe_rows(batch))
            for name, sae in self.dictionaries.items()
        }
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every > 0 and (self.global_step + 1) % every == 0:
            for name, sae in self.dictionaries.items():
                for metric, value in sae.scalars(steps[name]).items():
                    self.log(
                        _key("train", metric, name), value, prog_bar=not name and metric in ("fvu", "l0")
                    )
        return torch.stack([step.loss for step in steps.values()]).sum() if len(steps) > 1 else steps[""].loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam, fused where that exists, with warm-up and decay over the planned steps."""
        saes = self.dictionaries.values()
        scales_gradients = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        fused = self.device.type in ("cpu", "cuda") and not scales_gradients
        optimizer = torch.optim.Adam([sae.parameter_group() for sae in saes], fused=fused)
        planned = planned_steps(self.trainer)
        factors = [lr_factor(planned, sae.optimization) for sae in saes]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Any,  # noqa: ARG002
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,  # noqa: ARG002
    ) -> None:
        """Each dictionary's gradients on their own: a joint norm would couple them."""
        for sae in self.dictionaries.values():
            sae.prepare_gradients(gradient_clip_val)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Step, then project: here, because checkpoints are taken before `on_train_batch_end` reaches us."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        for sae in self.dictionaries.values():
            sae.project()

    def on_validation_epoch_start(self) -> None:
        """Start the sums of held-out metrics."""
        if self.trainer.state.fn != TrainerFn.FITTING:
            self._prepare()
        self._held_out = {name: sae.new_metrics() for name, sae in self.dictionaries.items()}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        """Add a batch of served held-out rows."""
        for name, sae in self.dictionaries.items():
            sae.measure(batch, self._held_out[name])

    def on_validation_epoch_end(self) -> None:
        """Log held-out metrics over all rows of all ranks."""
        stage = "test" if self.trainer.testing else "val"
        for name, metrics in self._held_out.items():
            for metric, value in metrics.compute().items():
                self.log(
                    _key(stage, metric, name),
                    value.float().cpu(),
                    prog_bar=not name and metric == "fvu",
                    sync_dist=True,  # equal on all ranks already; Lightning warns where this is not said
                )

    def on_test_epoch_start(self) -> None:
        """As in validation."""
        self.on_validation_epoch_start()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """As in validation."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """As in validation, under "test/"."""
        self.on_validation_epoch_end()

    def on_predict_start(self) -> None:
        """Read the data module's normalisation."""
        self._prepare()

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:  # noqa: ARG002
        """Latents `(batch, d_sae)` of served rows, by dictionary."""
        return {name: sae.encode_served(batch) for name, sae in self.dictionaries.items()}

    def _prepare(self) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        served = getattr(data, "d_in", None)
        for sae in self.dictionaries.values():
            if served is not None and sae.hparams["d_in"] != served:
                raise ValueError(
                    f"the data serves d_in={served}, but the SAE was built for {sae.hparams['d_in']}: "
                    f"give d_in={served}"
                )
            sae.prepare(getattr(data, "scaling", None))

    def _describe_rows(self, batch: Batch) -> Callable[[Tensor], str]:
        def describe(rows: Tensor) -> str:
            words = f"step {self.global_step}, first is row {int(rows[0])}"
            provenance = getattr(self.trainer.datamodule, "provenance", lambda _: None)(batch)  # type: ignore[attr-defined]
            if provenance is None:
                return words
            at = {
                name: int(getattr(provenance, name)[rows[0]])
                for name in ("document_index", "position", "token_id")
            }
            return (
                f"{words}: document {at['document_index']}, position {at['position']}, token {at['token_id']}"
            )

        return describe


def _key(stage: str, metric: str, name: str) -> str:
    return f"{stage}/{metric}/{name}" if name else f"{stage}/{metric}"
