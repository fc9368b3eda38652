"""Train any architecture of SAELens with Lightning, on a data module's batches (needs the extra `saelens`).

In: a training config of SAELens, as in its `cfg.json`. Out: SAELens's own training SAE, trained with its losses,
coefficients and clipping, and saved in its format with the data module's normalisation folded in.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from typing_extensions import Self

from deeplens_lightning.activation_data import activation_data
from deeplens_lightning.distributed import max_over_ranks
from deeplens_lightning.sae.averaging import valid_averages
from deeplens_lightning.sae.float32_state import Float32State
from deeplens_lightning.sae.interop.files import fresh_folder
from deeplens_lightning.sae.interrupted_validation import repeat_interrupted_validation
from deeplens_lightning.sae.metrics import HeldOutMetrics
from deeplens_lightning.sae.nonfinite import replace_nonfinite
from deeplens_lightning.sae.run_length import plan
from deeplens_lightning.sae.schedule import Optimization, WarmupDecay, check_eps
from deeplens_lightning.sae.units import RowUnits

EPS = 1e-8
"""Adam's epsilon in SAELens."""


class SAELensModule(Float32State, LightningModule):
    """Train a `TrainingSAE` of SAELens.

    Args:
        d_in: width of the rows; on the command line it is taken from the data.
        config: training config of SAELens, such as `{"architecture": "matching_pursuit", "d_sae": 4096}`.
        lr: peak learning rate of Adam.
        optimization: the learning rate schedule, Adam's betas and the clipping norm; `eps` is always 1e-8, as
            in SAELens.
        dead_feature_window: number of steps without activation after which a latent is dead, as in SAELens.
        seed: seed of the initial weights.

    Raises:
        ImportError: sae_lens is not installed.
        ValueError: `config` has no architecture.

    Attributes:
        steps_since_fired: float32 `(d_sae,)`, steps since each latent was last active on any rank.
    """

    steps_since_fired: Tensor
    _held_out: tuple[HeldOutMetrics, ...] = ()  # not a submodule: `bf16-true` must not convert its sums

    def __init__(
        self,
        d_in: int,
        config: dict[str, Any],
        *,
        lr: float = 3e-4,
        optimization: Optimization | None = None,
        dead_feature_window: int = 1000,
        seed: int = 0,
    ) -> None:
        super().__init__()
        try:
            from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig
        except ImportError as error:
            raise ImportError(
                "SAELensModule needs sae_lens: pip install 'deeplens-lightning[saelens]'"
            ) from error
        if "architecture" not in config:
            raise ValueError("config needs an architecture, such as 'topk' or 'matching_pursuit'")
        self.save_hyperparameters(ignore=["optimization"])
        self.optimization = Optimization.of(optimization)
        self.lr, self.dead_feature_window = lr, dead_feature_window
        full = TrainingSAEConfig.from_dict({**config, "d_in": d_in})
        with torch.random.fork_rng(devices=[]):  # SAELens uses the global generator
            torch.manual_seed(seed)
            self.sae = TrainingSAE.from_dict(full.to_dict())
        self.side = RowUnits({"": d_in})  # the name is part of the state dict
        self.register_buffer("steps_since_fired", torch.zeros(full.d_sae, dtype=torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.sae.dtype = next(
            self.sae.parameters()
        ).dtype  # SAELens casts rows to it, but sets it in its own `to` only
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Raw reconstructions of raw activations `(..., d_in)`."""
        rows = self.side.from_raw(x).to(self.sae.dtype)
        return self.side.to_raw(self.sae(rows)).to(torch.promote_types(x.dtype, rows.dtype))

    def configure_callbacks(self) -> list[Callback]:
        """With weight averaging, a `ValidAverages` keeps buffers out of the averages."""
        return valid_averages(self.trainer) if self.trainer.state.fn == TrainerFn.FITTING else []

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Repeat a validation that the checkpoint interrupted."""
        repeat_interrupted_validation(checkpoint)

    def on_fit_start(self) -> None:
        """Store the data module's normalisation."""
        self.side.adopt(activation_data(self.trainer).scaling)

    def on_train_start(self) -> None:
        """Plan the learning rate, and say so if the length of training is not known."""
        if (note := plan(self.trainer, [self.optimization]).note) is not None:
            rank_zero_info(note)

    def on_train_epoch_start(self) -> None:
        """Plan the learning rate again, because a callback may have changed a limit."""
        plan(self.trainer, [self.optimization])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:  # noqa: ARG002
        """SAELens's training pass on a batch as the data module serves it."""
        from sae_lens.saes.sae import TrainStepInput

        output = self.sae.training_forward_pass(
            TrainStepInput(
                sae_in=batch.to(self.sae.dtype),
                coefficients=self._coefficients(),
                dead_neuron_mask=self.steps_since_fired > self.dead_feature_window,
                n_training_steps=self.global_step,
                is_logging_step=False,
            )
        )
        with torch.no_grad():
            latents = output.feature_acts.to_dense() if output.feature_acts.is_sparse else output.feature_acts
            self.steps_since_fired.add_(1).masked_fill_(max_over_ranks((latents > 0).any(0)), 0)
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every > 0 and (self.global_step + 1) % every == 0:
            self.log("train/loss", output.loss.detach(), prog_bar=True)
            self.log("train/l0", (latents > 0).sum(1).float().mean(), prog_bar=True)
        loss: Tensor = output.loss
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam with the same schedule as `SparseAutoencoder`.

        Raises:
            ValueError: Adam's epsilon is 0 in the precision of the weights.
        """
        o = self.optimization
        check_eps(EPS, self.sae.dtype)
        optimizer = torch.optim.Adam(self.sae.parameters(), lr=self.lr, betas=o.betas, eps=EPS)
        schedule = WarmupDecay(optimizer, [o])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Any,  # noqa: ARG002
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip to `gradient_clip_val`, or to `optimization.clip_norm` (1, as SAELens does, by default)."""
        self.optimization.clip(self.sae.parameters(), gradient_clip_val, gradient_clip_algorithm)

    def on_validation_epoch_start(self) -> None:
        """Start new held-out metrics."""
        side = self.side
        self._held_out = (HeldOutMetrics(len(self.steps_since_fired), side.width, self.device, side.to_raw),)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:  # noqa: ARG002
        """Add a served batch of held-out rows."""
        (metrics,) = self._held_out
        rows, _, bad = replace_nonfinite(batch, batch, batch.new_zeros(()))
        latents = self.sae.encode(rows.to(self.sae.dtype))
        reconstruction = self.sae.decode(latents)
        metrics.update(rows, reconstruction, latents.to_dense() if latents.is_sparse else latents, bad)

    def on_validation_epoch_end(self) -> None:
        """Log held-out metrics over all rows of all ranks."""
        (metrics,) = self._held_out
        for name, value in metrics.compute().items():
            self.log(f"val/{name}", value.float().cpu(), prog_bar=name == "fvu")

    @torch.no_grad()
    def export_saelens(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Save SAELens's inference model in its format, with the data module's normalisation folded in.

        `folder`, `overwrite`, the result and `FileExistsError` are those of `SparseAutoencoder.export_saelens`.

        Raises:
            ValueError: this normalisation cannot be folded into this architecture.
        """
        from sae_lens.saes.sae import TrainingSAE

        folded = TrainingSAE.from_dict(self.sae.cfg.to_dict())
        folded.load_state_dict(self.sae.state_dict())
        shift, scale = self.side.shift.cpu(), self.side.scale.cpu()
        if bool((shift == 0).all() and (scale == scale[0]).all()):
            if scale[0] != 1:
                folded.fold_activation_norm_scaling_factor(float(scale[0]))
        else:
            try:
                folded.fold_activation_whitening(shift, torch.diag(scale), torch.diag(1 / scale))
            except NotImplementedError as error:
                raise ValueError(
                    f"train with normalize='none' or 'mean_norm' to export this one: {error}"
                ) from error
        with fresh_folder(folder, overwrite=overwrite) as new:
            folded.save_inference_model(new)
        return Path(folder)

    def _coefficients(self) -> dict[str, float]:
        """The weights of SAELens's loss terms at this step, warmed up."""
        from sae_lens.saes.sae import TrainCoefficientConfig

        coefficients = {}
        for name, given in self.sae.get_coefficients().items():
            value, warm_up = given if isinstance(given, TrainCoefficientConfig) else (given, 0)
            coefficients[name] = value * min(1.0, (self.global_step + 1) / warm_up) if warm_up else value
        return coefficients
