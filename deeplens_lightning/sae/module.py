"""`SparseAutoencoder`: the reference LightningModule over the pure parts of this folder.

In: batches of scaled rows from a data module, `(batch, d_in)` or a dict of them by hook point.
Out: a self-contained dictionary: `encode`, `decode` and `forward` take and give raw activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from deeplens_lightning.sae.activations import BatchTopK, TopK, architecture_spec, make_activation
from deeplens_lightning.sae.distributed import max_over_ranks, mean_over_ranks, world_size
from deeplens_lightning.sae.forward import Pass, Weights, aux_fvu, decode, dense_pass, encode, sparse_pass
from deeplens_lightning.sae.initialize import (
    generator,
    geometric_median,
    normalize_rows,
    remove_parallel,
    rms_norm,
    unit_rows,
)
from deeplens_lightning.sae.metrics import HeldOutMetrics, fvu
from deeplens_lightning.sae.schedule import Optimization, default_lr, lr_factor, planned_steps
from deeplens_lightning.scaling import Scaling

Batch = Tensor | Mapping[str, Tensor]
Kernel = Literal["auto", "sparse", "dense"]


@dataclass(frozen=True, slots=True)
class Step:
    """What one training step computed: the loss, and scalars to log."""

    loss: Tensor
    fvu: Tensor
    l0: Tensor


class SparseAutoencoder(LightningModule):
    """A sparse dictionary of activations: autoencoder, transcoder or crosscoder.

    Args:
        d_in: width of the rows; a dict by hook point when the data module serves several.
        d_sae: latents; default `expansion_factor * d_in`.
        expansion_factor: see `d_sae`.
        k: active latents a row, for the top-k family.
        architecture: "topk", "batch_topk", "matryoshka", "relu", "jumprelu", "gated", or a dict with
            that `name` and the settings of the class of `activations.py`.
        input_hook: hook point(s) to read; default all of them.
        output_hook: hook point(s) to reconstruct; default those read. Others make it a transcoder
            (Dunefsky et al. 2024, arXiv 2406.11944); several hook points share latents as in a
            crosscoder (Lindsey et al. 2024).
        skip: a linear map from input to output beside the latents, for transcoders
            (Paulo et al. 2025, arXiv 2501.18823).
        lr: peak learning rate; default falls with the square root of d_sae.
        optimization: the rest of Adam's settings, see `Optimization`.
        dead_after_tokens: a latent silent for so many rows is dead; default the smaller of 10 million
            and a tenth of the planned rows.
        seed: of the initial dictionary.
        kernel: "sparse" touches active latents only, "dense" all, "auto" chooses.
        on_nonfinite: "stop" at a row with NaN or infinity, naming it, or "skip" and count such rows.

    Raises:
        ValueError: sizes, names or settings that cannot work together.
    """

    shift: Tensor
    scale: Tensor
    out_shift: Tensor
    out_scale: Tensor
    unit: Tensor
    out_unit: Tensor
    silent_tokens: Tensor
    tokens_seen: Tensor
    nonfinite_rows: Tensor
    initialized: Tensor

    def __init__(
        self,
        d_in: int | dict[str, int],
        d_sae: int | None = None,
        *,
        expansion_factor: int = 16,
        k: int = 32,
        architecture: str | dict[str, Any] = "topk",
        input_hook: str | list[str] | None = None,
        output_hook: str | list[str] | None = None,
        skip: bool = False,
        lr: float | None = None,
        optimization: Optimization | None = None,
        dead_after_tokens: int | None = None,
        seed: int = 0,
        kernel: Kernel = "auto",
        on_nonfinite: Literal["stop", "skip"] = "stop",
    ) -> None:
        super().__init__()
        optimization = Optimization(**optimization) if isinstance(optimization, Mapping) else optimization
        self.optimization = optimization or Optimization()
        architecture = architecture_spec(architecture)
        self.save_hyperparameters(
            {
                "d_in": dict(d_in) if isinstance(d_in, Mapping) else int(d_in),
                "d_sae": d_sae,
                "expansion_factor": expansion_factor,
                "k": k,
                "architecture": {
                    key: list(v) if isinstance(v, tuple) else v for key, v in architecture.items()
                },
                "input_hook": input_hook,
                "output_hook": output_hook,
                "skip": skip,
                "lr": lr,
                "optimization": asdict(self.optimization),
                "dead_after_tokens": dead_after_tokens,
                "seed": seed,
                "kernel": kernel,
                "on_nonfinite": on_nonfinite,
            }
        )
        self.inputs = _choose_hooks(d_in, input_hook, "input_hook")
        self.outputs = self.inputs if output_hook is None else _choose_hooks(d_in, output_hook, "output_hook")
        self.is_transcoder = self.inputs != self.outputs
        if skip and not self.is_transcoder:
            raise ValueError(
                "skip=True around an autoencoder would learn the identity; give another output_hook"
            )
        self.d_read, self.d_write = sum(self.inputs.values()), sum(self.outputs.values())
        self.d_sae = expansion_factor * self.d_read if d_sae is None else d_sae
        if self.d_sae < 1:
            raise ValueError(f"d_sae={self.d_sae} must be positive (or expansion_factor={expansion_factor})")
        self.lr = default_lr(self.d_sae) if lr is None else lr
        self.kernel: Kernel = kernel
        self.on_nonfinite = on_nonfinite
        self.activation = make_activation(architecture, d_sae=self.d_sae, d_out=self.d_write, k=k)
        if kernel == "sparse" and not isinstance(self.activation, TopK):
            raise ValueError(
                f"kernel='sparse' needs a top-k architecture, not {architecture['name']!r}; use 'auto'"
            )
        self._register_tensors(seed, skip)
        self._held_out: HeldOutMetrics | None = None
        self._planned: int | None = None
        self._started = False

    def _register_tensors(self, seed: int, skip: bool) -> None:
        rng = generator(seed)
        decoder = unit_rows(self.d_sae, self.d_write, rng)
        encoder = unit_rows(self.d_sae, self.d_read, rng) if self.is_transcoder else decoder.clone()
        self.W_enc = nn.Parameter(encoder)
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae))
        self.W_dec = nn.Parameter(decoder)
        self.b_dec = nn.Parameter(torch.zeros(self.d_write))
        self.W_skip = nn.Parameter(torch.zeros(self.d_write, self.d_read)) if skip else None
        if not self.activation.unit_norm:  # Conerly et al. 2024 start small: 0.1
            with torch.no_grad():
                self.W_enc.mul_(0.1)
                self.W_dec.mul_(0.1)
        for name, width in (("", self.d_read), ("out_", self.d_write)):
            self.register_buffer(f"{name}shift", torch.zeros(width))
            self.register_buffer(f"{name}scale", torch.ones(width))
            self.register_buffer(f"{name}unit", torch.ones(width))
        self.register_buffer("silent_tokens", torch.zeros(self.d_sae, dtype=torch.int64))
        self.register_buffer("tokens_seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("nonfinite_rows", torch.zeros((), dtype=torch.int64))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))

    @property
    def weights(self) -> Weights:
        """The dictionary's tensors, in its own units."""
        center = None if self.is_transcoder else self.b_dec
        return Weights(self.W_enc, self.b_enc, self.W_dec, self.b_dec, center, self.W_skip)

    def encode(self, x: Batch) -> Tensor:
        """Latents `(..., d_sae)` of raw activations `(..., d_in)`, or a dict of them by hook point."""
        rows = (_join(x, self.inputs).to(self.W_enc.dtype) - self.shift) * (self.scale / self.unit)
        return encode(rows, self.weights, self.activation)

    def decode(self, latents: Tensor) -> Any:
        """Raw activations `(..., d_in)` (a dict for several output hooks) of latents `(..., d_sae)`."""
        return self._raw(decode(latents, self.weights))

    def forward(self, x: Batch) -> Any:
        """Raw reconstructions of raw activations, shaped as `decode` gives them."""
        rows = (_join(x, self.inputs).to(self.W_enc.dtype) - self.shift) * (self.scale / self.unit)
        return self._raw(self._reconstruct(rows, encode(rows, self.weights, self.activation)))

    def _reconstruct(self, rows: Tensor, latents: Tensor) -> Tensor:
        out = decode(latents, self.weights)
        return out if self.W_skip is None else out + nn.functional.linear(rows, self.W_skip)

    def _raw(self, rows: Tensor) -> Any:
        raw = rows * (self.out_unit / self.out_scale) + self.out_shift
        if list(self.outputs) == [""] or len(self.outputs) == 1:
            return raw
        return dict(zip(self.outputs, raw.split(list(self.outputs.values()), dim=-1), strict=True))

    def adopt_scaling(self, scaling: Scaling | Mapping[str, Scaling]) -> None:
        """Take the data module's normalisation in, so that the SAE reads raw activations afterwards."""
        for name, hooks in (("", self.inputs), ("out_", self.outputs)):
            chosen = [scaling] if isinstance(scaling, Scaling) else [scaling[hook] for hook in hooks]
            getattr(self, f"{name}shift").copy_(torch.cat([s.shift for s in chosen]))
            getattr(self, f"{name}scale").copy_(torch.cat([s.scale for s in chosen]))

    @torch.no_grad()
    def initialize_from(self, batch: Batch) -> None:
        """Set the units and the decoder's bias from a first batch of scaled rows, alike on every rank.

        Units bring each hook point to unit mean squared norm around its median; the bias is the
        geometric median of the rows (Bricken et al. 2023; Gao et al. 2024).
        """
        medians = []
        for name, hooks in (("", self.inputs), ("out_", self.outputs)):
            medians, units = [], []
            for hook, width in hooks.items():
                rows = _join(batch, {hook: width}).float()
                rows = rows[rows.isfinite().all(1)]
                median = mean_over_ranks(geometric_median(rows) if len(rows) else rows.new_zeros(width))
                medians.append(median)
                units.append(mean_over_ranks(rms_norm(rows - median)).expand(width))
            getattr(self, f"{name}unit").copy_(torch.cat(units))
        self.b_dec.copy_(torch.cat(medians) / self.out_unit)
        self.activation.to(self.device)
        self.initialized.fill_(True)

    def losses(self, x: Tensor, y: Tensor, progress: float = 1.0) -> tuple[Step, Pass]:
        """Loss and scalars of rows x `(batch, d_read)` to reconstruct y `(batch, d_write)`, both in own units."""
        result = self._pass(x, y, progress)
        errors = (result.reconstructions - y).square().sum((1, 2))
        mean = y.mean(0)
        deviation, energy = (y - mean).square().sum(), y.square().sum()
        loss = fvu(errors.mean(), deviation, energy) + result.penalty
        if self.activation.aux_coefficient > 0:
            dead = self._dead_candidates()
            if dead is not None:
                residual = y - result.reconstructions[-1]
                aux = aux_fvu(x, residual, self.weights, *dead, k=self.activation.aux_k)
                loss = loss + self.activation.aux_coefficient * aux
        scalars = fvu(errors[-1].detach(), deviation, energy), result.active / len(x)
        return Step(loss, *scalars), result

    def _pass(self, x: Tensor, y: Tensor, progress: float) -> Pass:
        activation = self.activation
        if isinstance(activation, TopK) and self.kernel != "dense":
            if self.kernel == "sparse" or 16 * activation.k <= self.d_sae:
                return sparse_pass(x, self.weights, activation)
        return dense_pass(x, y, self.weights, activation, progress)

    def _dead_candidates(self) -> tuple[Tensor, Tensor] | None:
        """Up to 8 aux_k latents that AuxK may use, the longest silent first, and which of them are dead.

        The CPU looks how many are dead; elsewhere looking would wait for the device, so the number of
        candidates is fixed and the living among them are masked.
        """
        after, limit = self.dead_after_tokens, min(self.d_sae, 8 * self.activation.aux_k)
        if self.device.type == "cpu":
            dead = (self.silent_tokens >= after).nonzero().squeeze(1)
            if len(dead) == 0:
                return None
            if len(dead) > limit:
                dead = dead[self.silent_tokens[dead].topk(limit).indices]
            return dead, torch.ones_like(dead, dtype=torch.bool)
        silent, dead = self.silent_tokens.topk(limit)
        return dead, silent >= after

    @property
    def dead_after_tokens(self) -> int:
        """Rows of silence after which a latent counts as dead."""
        given: int | None = self.hparams["dead_after_tokens"]
        if given is not None:
            return given
        planned = (self._planned or 0) * self._rows_per_step
        return min(10_000_000, planned // 10) if planned else 10_000_000

    _rows_per_step = 0

    @torch.no_grad()
    def count(self, result: Pass, rows: int) -> None:
        """Advance the counters of silence, and BatchTopK's threshold, by a batch of `rows` rows a rank."""
        fired = max_over_ranks(result.fired)
        rows *= world_size()
        self.silent_tokens.add_(rows).masked_fill_(fired, 0)
        self.tokens_seen.add_(rows)
        if isinstance(self.activation, BatchTopK):
            self.activation.observe(mean_over_ranks(result.smallest))

    def on_fit_start(self) -> None:
        """Read the plan and the data module's normalisation, once they are final."""
        self._planned = planned_steps(self.trainer)
        self._started = bool(self.initialized)
        scaling = getattr(self.trainer.datamodule, "scaling", None)
        if scaling is not None:
            self.adopt_scaling(scaling)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Initialise from the first batch of a new SAE; a restored one has been."""
        self._rows_per_step = (
            len(_join(batch, self.inputs)) * world_size() * self.trainer.accumulate_grad_batches
        )
        if not self._started:
            self._started = bool(self.initialized)
            if not self._started:
                self.initialize_from(batch)
            self._started = True

    def _units(self, batch: Batch) -> tuple[Tensor, Tensor]:
        x = _join(batch, self.inputs).to(self.W_enc.dtype) / self.unit
        return x, (
            _join(batch, self.outputs).to(self.W_enc.dtype) / self.out_unit if self.is_transcoder else x
        )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one batch of scaled rows."""
        x, y = self._units(batch)
        x, y = self._screen(x, y, batch)
        planned = self._planned
        step, result = self.losses(x, y, self.trainer.global_step / planned if planned else 1.0)
        self.count(result, len(x))
        if self._is_log_step:
            self._log_training(step)
        return step.loss

    def _screen(self, x: Tensor, y: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return x, y

    @property
    def _is_log_step(self) -> bool:
        every = self.trainer.log_every_n_steps
        return every > 0 and (self.trainer.global_step + 1) % every == 0

    @torch.no_grad()
    def _log_training(self, step: Step) -> None:
        """One transfer from the device, on steps that log; the values stay on the CPU for progress bars."""
        scalars = torch.stack([step.loss.detach(), step.fvu, step.l0]).float()
        dead = (self.silent_tokens >= self.dead_after_tokens).float().mean()
        loss, fvu_, l0, dead = torch.cat([mean_over_ranks(scalars), dead[None]]).cpu()
        self.log("train/loss", loss)
        self.log("train/fvu", fvu_, prog_bar=True)
        self.log("train/l0", l0, prog_bar=True)
        self.log("train/dead_fraction", dead)

    def on_validation_epoch_start(self) -> None:
        """Start the sums of held-out metrics."""
        self._held_out = HeldOutMetrics(self.d_sae, self.d_write, self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch of scaled held-out rows."""
        assert self._held_out is not None
        x, y = self._units(batch)
        latents = encode(x, self.weights, self.activation)
        self._held_out.update(y, self._reconstruct(x, latents), latents)

    def on_validation_epoch_end(self) -> None:
        """Log held-out metrics over all rows of all ranks."""
        assert self._held_out is not None
        for name, value in self._held_out.compute().items():
            self.log(f"{self._stage}/{name}", value.float(), prog_bar=name == "fvu", rank_zero_only=False)

    @property
    def _stage(self) -> str:
        return "test" if self.trainer.testing else "val"

    on_test_epoch_start, test_step, on_test_epoch_end = (
        on_validation_epoch_start,
        validation_step,
        on_validation_epoch_end,
    )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Fused Adam where it exists, with warm-up and decay over the planned steps."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        fused = self.device.type in ("cpu", "cuda") and scaler is None
        optimizer = torch.optim.Adam(self.parameter_groups(), fused=fused)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lr_factor(planned_steps(self.trainer), self.optimization)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """This SAE's parameters with its own settings of Adam."""
        o = self.optimization
        return [{"params": list(self.parameters()), "lr": self.lr, "betas": o.betas, "eps": o.eps}]

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Keep the decoder's gradient on the sphere, then clip this SAE's gradients by their norm."""
        self.prepare_gradients(gradient_clip_val)

    def prepare_gradients(self, clip_norm: float | None = None) -> None:
        """Remove the decoder's parallel gradient and clip to `clip_norm` or the SAE's own setting."""
        if self.activation.unit_norm and self.W_dec.grad is not None:
            remove_parallel(self.W_dec.grad, self.W_dec)
        clip_norm = self.optimization.clip_norm if clip_norm is None else clip_norm
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters(), clip_norm)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Step, then return to unit norms: here and not at the batch's end, which checkpoints precede."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.after_optimizer_step()

    def after_optimizer_step(self) -> None:
        """Project parameters back onto their constraints."""
        if self.activation.unit_norm:
            normalize_rows(self.W_dec)
        self.activation.after_step()


def _choose_hooks(
    d_in: int | Mapping[str, int], hook: str | Sequence[str] | None, argument: str
) -> dict[str, int]:
    """Widths by hook point, in order; the only hook of an int `d_in` is called ""."""
    if not isinstance(d_in, Mapping):
        if hook is not None:
            raise ValueError(f"{argument}={hook!r} needs d_in by hook point, a dict, but d_in={d_in}")
        return {"": int(d_in)}
    names = list(d_in) if hook is None else [hook] if isinstance(hook, str) else list(hook)
    for name in names:
        if name not in d_in:
            raise ValueError(f"{argument}={name!r} is not served; the data has {', '.join(d_in)}")
    return {name: int(d_in[name]) for name in names}


def _join(batch: Batch, hooks: Mapping[str, int]) -> Tensor:
    """Rows of the chosen hook points side by side, `(..., sum of widths)`."""
    if isinstance(batch, Tensor):
        return batch
    chosen = [batch[hook] for hook in hooks]
    return chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=-1)
