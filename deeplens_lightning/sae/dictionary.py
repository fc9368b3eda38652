"""A sparse dictionary of activations as a plain `nn.Module`: weights, encode, decode, losses and counters.

In: raw activations, or batches as a data module serves them (normalised). Out: latents, reconstructions and
losses. Nothing here depends on Lightning: `module.py` trains dictionaries with a Trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deeplens_lightning.distributed import mean_over_ranks
from deeplens_lightning.sae import forward as passes
from deeplens_lightning.sae import initialize, nonfinite
from deeplens_lightning.sae.activations import BatchTopK, TopK
from deeplens_lightning.sae.activity import Activity
from deeplens_lightning.sae.architectures import architecture_spec, make_activation
from deeplens_lightning.sae.forward import Kernel, Pass, Step, Weights
from deeplens_lightning.sae.metrics import HeldOutMetrics
from deeplens_lightning.sae.schedule import Optimization, default_lr
from deeplens_lightning.sae.units import RowUnits, Scalings, choose_hooks
from deeplens_lightning.types import Batch

DEAD_AFTER_TOKENS = 10_000_000  # Gao et al. 2024
AUX_CANDIDATES = 8  # candidates for AuxK, as a multiple of aux_k


class Dictionary(nn.Module):
    """Sparse dictionary of activations (autoencoder, transcoder or crosscoder), without Lightning.

    `encode`, `decode` and `forward` take and give raw activations. `prepare`, `initialize_from`, `step`,
    `prepare_gradients` and `project` are the parts of a training step, in this order.

    Attributes:
        W_enc: `(d_sae, d_read)`, d_read being the width of all hook points that are read together.
        b_enc: `(d_sae,)`.
        W_dec: `(d_sae, d_write)`.
        b_dec: `(d_write,)`.
        W_skip: `(d_write, d_read)`, or None.
        read: the hook points that are encoded, and their units.
        write: those that are reconstructed.
        activity: counters of silent latents.
        nonfinite_rows: int64 scalar, rows with NaN or infinity that were left out, over all ranks.
        initialized: bool scalar, whether units and biases are set (from a first batch, or by an import).
        settings: the constructor's arguments as numbers, strings and containers of them.
        trained_on: `model_name` and `hook_name` of the training data, where known; exports contain them.
        planned_tokens: largest number of rows that training will use, the sum over all ranks; None if unknown.
    """

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
        layer_norm: bool = False,
        lr: float | None = None,
        optimization: Optimization | None = None,
        dead_after_tokens: int | None = None,
        seed: int = 0,
        kernel: Kernel = "auto",
        compile_step: bool = False,
        on_nonfinite: Literal["stop", "skip"] = "stop",
    ) -> None:
        """Make a new dictionary with random weights.

        Args:
            d_in: width of the rows; a dict by hook point if the data module serves several.
            d_sae: number of latents; default `expansion_factor` times the width that is read.
            expansion_factor: number of latents per dimension of the rows; used if `d_sae` is not given.
            k: number of active latents per row, for the top-k family.
            architecture: "topk", "batch_topk", "matryoshka", "relu", "jumprelu" or "gated", or a dict with that `name`
                and settings: `{"name": "topk", "aux_k": 256}`. topk, batch_topk and matryoshka have `aux_k`,
                `aux_coefficient` and `prefixes`, the last two also `threshold_momentum`; relu and gated have `l1` and
                `warmup`; jumprelu has `coefficient`, `penalty` ("l0" or "tanh"), `bandwidth`, `init_threshold`, `warmup`
                and `tanh_scale`. The classes in `sae/activations.py` describe them.
            input_hook: canonical name(s) of the hook point(s) to read, such as `layers.3.mlp_in`; default all of them.
            output_hook: canonical name(s) of those to reconstruct; default those that are read. Other ones make it a
                transcoder (Dunefsky et al. 2024, arXiv 2406.11944). Several hook points share latents, as in a crosscoder
                (Lindsey et al., Anthropic, October 2024).
            skip: add a linear map from input to output beside the latents of a transcoder (Paulo et al. 2025, arXiv
                2501.18823).
            layer_norm: standardise every row before it is encoded, as DeepLens does; the row itself is reconstructed.
            lr: peak learning rate; the default is proportional to 1 / sqrt(d_sae).
            optimization: Adam's other settings and the learning rate schedule.
            dead_after_tokens: a latent is dead if it was inactive for this number of rows; default 10 million or a
                tenth of the planned rows, whichever is less.
            seed: seed of the initial weights.
            kernel: "sparse" computes with active latents only, "dense" with all of them; "auto" chooses.
            compile_step: run the loss through `torch.compile`.
            on_nonfinite: at a row with NaN or infinity, in training or validation, "stop" and name it, or "skip" it
                and count it.

        Raises:
            ValueError: sizes, names or settings that cannot work together.
        """
        super().__init__()
        spec = architecture_spec(architecture)
        self.d_in = dict(d_in) if isinstance(d_in, Mapping) else int(d_in)
        self.optimization = Optimization.of(optimization)
        self.settings: dict[str, Any] = {
            "d_in": self.d_in,
            "d_sae": d_sae,
            "expansion_factor": expansion_factor,
            "k": k,
            "architecture": spec,
            "input_hook": input_hook,
            "output_hook": output_hook,
            "skip": skip,
            "layer_norm": layer_norm,
            "lr": lr,
            "optimization": asdict(self.optimization),
            "dead_after_tokens": dead_after_tokens,
            "seed": seed,
            "kernel": kernel,
            "compile_step": compile_step,
            "on_nonfinite": on_nonfinite,
        }
        self.record_settings()
        reads = choose_hooks(d_in, input_hook, "input_hook")
        writes = reads if output_hook is None else choose_hooks(d_in, output_hook, "output_hook")
        self.is_transcoder = reads != writes
        if skip and not self.is_transcoder:
            raise ValueError(
                "skip=True around an autoencoder would learn the identity; give another output_hook"
            )
        self.centers = not self.is_transcoder and not layer_norm
        self.read, self.write = RowUnits(reads, layer_norm=layer_norm), RowUnits(writes)
        self.d_sae = expansion_factor * self.read.width if d_sae is None else d_sae
        if self.d_sae < 1:
            raise ValueError(
                f"d_sae={self.d_sae} must be at least 1; give d_sae or a positive expansion_factor"
            )
        self.activation = make_activation(spec, d_sae=self.d_sae, d_out=self.write.width, k=k)
        if kernel == "sparse" and not isinstance(self.activation, TopK):
            raise ValueError(
                f"kernel='sparse' needs a top-k architecture, not {spec['name']!r}; use kernel='auto'"
            )
        self.kernel, self.on_nonfinite, self.compile_step = kernel, on_nonfinite, compile_step
        self.lr = default_lr(self.d_sae) if lr is None else lr
        self.activity = Activity(self.d_sae)
        self.register_buffer("nonfinite_rows", torch.zeros((), dtype=torch.int64))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))
        sizes = (self.d_sae, self.read.width, self.write.width)
        encoder, decoder = initialize.encoder_decoder(
            *sizes, seed, unit_norm=self.activation.unit_norm, tied=not self.is_transcoder
        )
        self.W_enc, self.W_dec = nn.Parameter(encoder), nn.Parameter(decoder)
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae))
        self.b_dec = nn.Parameter(torch.zeros(self.write.width))
        self.W_skip = nn.Parameter(torch.zeros(self.write.width, self.read.width)) if skip else None
        self.trained_on: dict[str, str] = {}
        self.planned_tokens: int | None = None
        self._dead_after_tokens = dead_after_tokens
        self._served: Scalings | None = None
        self._ready = False  # a copy of `initialized` that can be read without waiting for the device
        self._compiled: Callable[..., tuple[Step, Pass]] | None = None
        self._nonfinite = nonfinite.NonFiniteRows()

    def record_settings(self) -> None:
        """Called by the constructor when `settings` is complete; a subclass may save them elsewhere."""

    # ---- on raw activations

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.W_enc.device

    @property
    def weights(self) -> Weights:
        """The weights, which act on rows in the dictionary's own units."""
        center = self.b_dec if self.centers else None
        return Weights(self.W_enc, self.b_enc, self.W_dec, self.b_dec, center, self.W_skip)

    def encode(self, x: Batch) -> Tensor:
        """Latents `(..., d_sae)` of raw activations `(..., d_in)`, or of a dict of them by hook point."""
        return passes.encode(self._cast(self.read.from_raw(x)), self.weights, self.activation)

    def decode(self, latents: Tensor) -> Any:
        """Raw activations `(..., d_in)` of latents `(..., d_sae)`; a dict if several hook points are written.

        The skip connection of a transcoder is left out, because it needs the input: `forward` adds it.
        """
        return self.write.split(self._cast(self.write.to_raw(passes.decode(latents, self.weights))))

    def forward(self, x: Batch) -> Any:
        """Raw reconstructions of raw activations x, in the shapes of `decode` and the wider dtype of x and weights."""
        rows = self._cast(self.read.from_raw(x))
        raw = self.write.to_raw(passes.autoencode(rows, self.weights, self.activation))
        given = x if isinstance(x, Tensor) else next(iter(x.values()))
        return self.write.split(raw.to(torch.promote_types(given.dtype, rows.dtype)))

    def _cast(self, rows: Tensor) -> Tensor:
        return rows.to(self.W_enc.dtype)

    # ---- training

    def prepare(self, served: Scalings | None) -> None:
        """Prepare for batches that are normalised by `served` (None: not at all).

        A new dictionary takes this normalisation as its own. One that was trained or imported keeps its own,
        and batches are converted to it.
        """
        # An import has units of 1 until it is trained. Releases that trained it with these left its weights as they were.
        self._ready = bool(self.initialized) and (self.write.is_measured or bool(self.activity.tokens_seen))
        if self.compile_step:
            self._compiled = self._compiled or torch.compile(self.losses)
        for units in (self.read, self.write):
            if not self.initialized:
                units.adopt(served)
            units.expect(served)
        self._served = served

    @torch.no_grad()
    def initialize_from(self, batch: Batch) -> None:
        """Set units and, if new, the decoder's bias from the first batch, the same on all ranks; later calls do nothing.

        The bias is the geometric median (Bricken et al. 2023; Gao et al. 2024). For architectures in which
        half of all latents are active at first, the encoder is scaled so that reconstructions have the norm
        of the rows (as in the released code of Gao et al. 2024). Weights of an import are rescaled to the units, with
        equal reconstructions. A batch does not count if all rows of all ranks hold NaN or infinity.
        """
        if self._ready or (self.initialized and self.write.is_measured):
            return
        center, bias = self.read.measure(batch), self.write.measure(batch)
        if not (center.isfinite().all() and bias.isfinite().all()):
            return
        new = not self.initialized
        if new:
            self.b_dec.copy_(bias)
            self.initialized.fill_(True)
        else:
            passes.adopt_units(self.weights, self.activation, self.read, self.write)
        self._ready = True
        for units in (self.read, self.write):
            units.expect(self._served)
        if new and self.activation.unit_norm and not isinstance(self.activation, TopK):
            passes.scale_encoder(self.rows(batch)[0], self.weights, self.activation)

    def rows(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Rows to read `(batch, d_read)` and to reconstruct `(batch, d_write)` of a served batch, in own units."""
        x = self._cast(self.read.from_served(batch))
        return x, x if self.centers else self._cast(self.write.from_served(batch))

    def step(self, batch: Batch, progress: float = 1.0, describe: nonfinite.Describe | None = None) -> Step:
        """Compute the loss of a served batch and update the counters.

        Args:
            batch: rows as the data module serves them.
            progress: share of the planned steps that is done, between 0 and 1.
            describe: from the number of a row in the batch to its place, for the error message.

        Raises:
            NonFiniteRowsError: a row of any rank holds NaN or infinity, and `on_nonfinite` is "stop"; on an accelerator
                only after some batches or from `check_rows`.
        """
        x, y, bad = nonfinite.replace_nonfinite(*self.rows(batch), self.b_dec)
        rows, skipped = nonfinite.count_over_ranks(x, bad)
        self.nonfinite_rows += skipped
        if self.on_nonfinite == "stop":
            self._nonfinite.watch(bad, len(x), skipped, describe)
        step, result = (self._compiled or self.losses)(x, y, progress)
        self.activity.advance(result.fired, rows)
        if isinstance(self.activation, BatchTopK):
            self.activation.observe(nonfinite.mean_over_finite_ranks(result.smallest.float()))
        return step

    def check_rows(self) -> None:
        """Raise the error of `step` on all ranks, if there were such rows since the last check."""
        if len(self._nonfinite):
            self._nonfinite.check()

    def losses(self, x: Tensor, y: Tensor, progress: float = 1.0) -> tuple[Step, Pass]:
        """Loss of reconstructing y `(batch, d_write)` from x `(batch, d_read)`, both in own units."""
        result = passes.training_pass(x, y, self.weights, self.activation, progress, self.kernel)
        dead = None
        if self.activation.aux_coefficient > 0:
            limit = AUX_CANDIDATES * self.activation.aux_k
            dead = self.activity.candidates(self.dead_after_tokens, limit)
        return passes.training_loss(x, y, self.weights, self.activation, result, dead), result

    def encode_served(self, batch: Batch) -> Tensor:
        """Latents `(batch, d_sae)` of a batch as the data module serves it."""
        return passes.encode(self._cast(self.read.from_served(batch)), self.weights, self.activation)

    @property
    def dead_after_tokens(self) -> int:
        """Number of inactive rows after which a latent counts as dead."""
        if self._dead_after_tokens is not None:
            return self._dead_after_tokens
        return min(DEAD_AFTER_TOKENS, self.planned_tokens // 10) if self.planned_tokens else DEAD_AFTER_TOKENS

    def scalars(self, step: Step) -> dict[str, Tensor]:
        """Metrics of a step to log, averaged over ranks; on the CPU after a single transfer."""
        values = torch.stack([value.detach().float() for value in (step.loss, step.fvu, step.l0)])
        dead = self.activity.dead_fraction(self.dead_after_tokens)
        loss, fvu_, l0, dead, skipped = torch.stack(
            [*mean_over_ranks(values), dead, self.nonfinite_rows.float()]
        ).cpu()
        named = {"loss": loss, "fvu": fvu_, "l0": l0, "dead_fraction": dead}
        return named | ({"nonfinite_rows": skipped} if self.on_nonfinite == "skip" else {})

    def parameter_group(self) -> dict[str, Any]:
        """This dictionary's parameters with its own settings of Adam, for `torch.optim.Adam`."""
        o = self.optimization
        return {"params": list(self.parameters()), "lr": self.lr, "betas": o.betas, "eps": o.eps}

    def prepare_gradients(self, limit: float | None = None, algorithm: str | None = None) -> None:
        """Remove the decoder gradient's part along its unit rows, then clip all gradients (`Optimization.clip`)."""
        if self.activation.unit_norm and self.W_dec.grad is not None:
            initialize.remove_parallel(self.W_dec.grad, self.W_dec)
        self.optimization.clip(self.parameters(), limit, algorithm)

    def project(self) -> None:
        """Restore the parameters' constraints after an optimizer step: decoder norms and thresholds."""
        if self.activation.unit_norm:
            initialize.normalize_rows(self.W_dec)
        self.activation.project()

    # ---- held-out metrics

    def new_metrics(self) -> HeldOutMetrics:
        """New metrics for held-out rows, on the device of the weights."""
        return HeldOutMetrics(self.d_sae, self.write.width, self.device, self.write.to_raw)

    @torch.no_grad()
    def measure(
        self, batch: Batch, metrics: HeldOutMetrics, describe: nonfinite.Describe | None = None
    ) -> None:
        """Update `metrics` with a served batch of held-out rows; `describe` is that of `step`."""
        x, y, bad = nonfinite.replace_nonfinite(*self.rows(batch), self.b_dec)
        metrics.nonfinite.add(bad, len(x), describe)
        for part, latents, made in passes.in_chunks(x, self.weights, self.activation):
            metrics.update(y[part], made, latents, None if bad is None else bad[part])
