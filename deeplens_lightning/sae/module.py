"""`SparseAutoencoder`: the reference LightningModule over the pure parts of this folder.

In: batches of scaled rows from a data module, `(batch, d_in)` or a dict of them by hook point.
Out: a self-contained dictionary: `encode`, `decode` and `forward` take and give raw activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deeplens_lightning.distributed import mean_over_ranks
from deeplens_lightning.model.splicing import spliced
from deeplens_lightning.sae import forward as passes
from deeplens_lightning.sae import initialize
from deeplens_lightning.sae.activations import BatchTopK, TopK, architecture_spec, make_activation
from deeplens_lightning.sae.activity import Activity
from deeplens_lightning.sae.checkpoint_compatibility import check_checkpoint
from deeplens_lightning.sae.forward import Pass, Step, Weights
from deeplens_lightning.sae.interop import others, saelens
from deeplens_lightning.sae.metrics import HeldOutMetrics, fvu
from deeplens_lightning.sae.nonfinite import raise_if_counted, screen
from deeplens_lightning.sae.schedule import Optimization, default_lr
from deeplens_lightning.sae.training import DictionaryTraining
from deeplens_lightning.sae.units import Batch, Scalings, Side, choose_hooks

DEAD_AFTER_TOKENS = 10_000_000  # Gao et al. 2024
AUX_CANDIDATES = 8  # times aux_k


class SparseAutoencoder(DictionaryTraining):
    """A sparse dictionary of activations: autoencoder, transcoder or crosscoder.

    Args:
        d_in: width of the rows; a dict by hook point when the data module serves several.
        d_sae: latents; default `expansion_factor` times the width that is read.
        expansion_factor: see `d_sae`.
        k: active latents a row, for the top-k family.
        architecture: "topk", "batch_topk", "matryoshka", "relu", "jumprelu" or "gated", or a dict with
            that `name` and settings of the class in `activations.py`.
        input_hook: hook point(s) to read; default all of them.
        output_hook: hook point(s) to reconstruct; default those that are read. Others make it a
            transcoder (Dunefsky et al. 2024, arXiv 2406.11944). Several hook points share latents, as
            in a crosscoder (Lindsey et al., Anthropic, October 2024).
        skip: a linear map from input to output beside the latents of a transcoder (Paulo et al. 2025,
            arXiv 2501.18823).
        layer_norm: standardise every row before encoding it, as DeepLens does; what is reconstructed
            stays the row itself.
        lr: peak learning rate; the default falls with the square root of d_sae.
        optimization: Adam's other settings and the schedule.
        dead_after_tokens: rows of silence after which a latent is dead; default the smaller of 10
            million and a tenth of the planned rows.
        seed: of the initial dictionary.
        kernel: "sparse" touches active latents only, "dense" all of them, "auto" chooses.
        compile_step: run the loss through `torch.compile`.
        on_nonfinite: "stop" at a row that holds NaN or infinity and name it, or "skip" and count it.

    Raises:
        ValueError: sizes, names or settings that cannot work together.
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
        kernel: Literal["auto", "sparse", "dense"] = "auto",
        compile_step: bool = False,
        on_nonfinite: Literal["stop", "skip"] = "stop",
    ) -> None:
        super().__init__()
        spec = architecture_spec(architecture)
        self.optimization = Optimization.of(optimization)
        self.save_hyperparameters(  # primitives only, which weights_only=True loads
            {
                "d_in": dict(d_in) if isinstance(d_in, Mapping) else int(d_in),
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
        )
        reads = choose_hooks(d_in, input_hook, "input_hook")
        writes = reads if output_hook is None else choose_hooks(d_in, output_hook, "output_hook")
        self.is_transcoder = reads != writes
        if skip and not self.is_transcoder:
            raise ValueError(
                "skip=True around an autoencoder would learn the identity; give another output_hook"
            )
        self.centers = not self.is_transcoder and not layer_norm
        self.read, self.write = Side(reads, layer_norm=layer_norm), Side(writes)
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
        self.kernel, self.on_nonfinite = kernel, on_nonfinite
        self.lr = default_lr(self.d_sae) if lr is None else lr
        self.activity = Activity(self.d_sae)
        self.register_buffer("nonfinite_rows", torch.zeros((), dtype=torch.int64))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))
        self._make_weights(seed, skip)
        self.trained_on: dict[str, str] = {}
        self.planned_tokens: int | None = None
        self._served: Scalings | None = None
        self._ready = False
        self._compiled: Callable[..., tuple[Step, Pass]] | None = None

    def _make_weights(self, seed: int, skip: bool) -> None:
        rng = initialize.generator(seed)
        decoder = initialize.unit_rows(self.d_sae, self.write.width, rng)
        if not self.activation.unit_norm:
            decoder *= 0.1  # Conerly et al. 2024
        encoder = (
            initialize.unit_rows(self.d_sae, self.read.width, rng) if self.is_transcoder else decoder.clone()
        )
        self.W_enc, self.W_dec = nn.Parameter(encoder), nn.Parameter(decoder)
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae))
        self.b_dec = nn.Parameter(torch.zeros(self.write.width))
        self.W_skip = nn.Parameter(torch.zeros(self.write.width, self.read.width)) if skip else None

    # ---- the dictionary, on raw activations

    @property
    def weights(self) -> Weights:
        """The dictionary's tensors, in its own units."""
        center = self.b_dec if self.centers else None
        return Weights(self.W_enc, self.b_enc, self.W_dec, self.b_dec, center, self.W_skip)

    def encode(self, x: Batch) -> Tensor:
        """Latents `(..., d_sae)` of raw activations `(..., d_in)`, or of a dict of them by hook point."""
        return passes.encode(self.read.from_raw(x), self.weights, self.activation)

    def decode(self, latents: Tensor) -> Any:
        """Raw activations `(..., d_in)` of latents `(..., d_sae)`; a dict when several are reconstructed.

        A skip connection is not in it: it needs the input, see `forward`.
        """
        return self.write.split(self.write.to_raw(passes.decode(latents, self.weights)))

    def forward(self, x: Batch) -> Any:
        """Raw reconstructions of raw activations x, shaped as `decode` gives them."""
        rows = self.read.from_raw(x)
        out = passes.reconstruct(rows, passes.encode(rows, self.weights, self.activation), self.weights)
        return self.write.split(self.write.to_raw(out))

    # ---- its share of training, called by `DictionaryTraining` for each dictionary that trains

    @property
    def dictionaries(self) -> dict[str, SparseAutoencoder]:
        """Itself, without a name."""
        return {"": self}

    def prepare(self, served: Scalings | None) -> None:
        """Get ready for batches that are normalised by `served`.

        A new SAE takes that normalisation as its own; one that has been trained or imported keeps
        its own, and batches are converted.
        """
        self._ready = bool(self.initialized)
        if self.hparams["compile_step"]:
            self._compiled = self._compiled or torch.compile(self.losses)
        for side in (self.read, self.write):
            if not self._ready:
                side.adopt(served)
            side.serve(served)
        self._served = served

    @torch.no_grad()
    def initialize_from(self, batch: Batch) -> None:
        """Take units and the decoder's bias from the first batch, alike on all ranks; later calls do nothing.

        The bias is the geometric median (Bricken et al. 2023; Gao et al. 2024). Where half of all
        latents are active at first, the encoder is scaled so that reconstructions have the rows' norm
        (the released code of Gao et al. 2024 does so too).
        """
        if self._ready:
            return
        self.read.measure(batch)
        self.b_dec.copy_(self.write.measure(batch))
        self.initialized.fill_(True)
        self._ready = True
        for side in (self.read, self.write):
            side.serve(self._served)
        if self.activation.unit_norm and not isinstance(self.activation, TopK):
            x, _ = self.rows(batch)
            made = (
                passes.reconstruct(x, passes.encode(x, self.weights, self.activation), self.weights)
                - self.b_dec
            )
            self.W_enc.div_(mean_over_ranks(initialize.rms_norm(made[made.isfinite().all(1)])))

    def rows(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What to read and what to reconstruct of a served batch, in own units."""
        x = self.read.from_served(batch)
        return x, x if self.centers else self.write.from_served(batch)

    def step(
        self, batch: Batch, progress: float = 1.0, report: Callable[[Tensor], str] | None = None
    ) -> Step:
        """Loss of a served batch, and the counters advanced.

        Args:
            batch: served rows.
            progress: share of the planned steps that is done.
            report: words for the rows (their indices) that hold NaN, for the error.
        """
        x, y = screen(*self.rows(batch), self.b_dec, self.nonfinite_rows, self.on_nonfinite, report)
        step, result = (self._compiled or self.losses)(x, y, progress)
        self.activity.advance(result.fired, len(x))
        if isinstance(self.activation, BatchTopK):
            self.activation.observe(mean_over_ranks(result.smallest))
        return step

    def losses(self, x: Tensor, y: Tensor, progress: float = 1.0) -> tuple[Step, Pass]:
        """Loss of x `(batch, d_read)` reconstructing y `(batch, d_write)`, both in own units."""
        result = self._pass(x, y, progress)
        errors = (result.reconstructions - y).square().sum((1, 2))
        deviation, energy = (y - y.mean(0)).square().sum(), y.square().sum()
        loss = fvu(errors.mean(), deviation, energy) + result.penalty
        if self.activation.aux_coefficient > 0:
            limit = AUX_CANDIDATES * self.activation.aux_k
            candidates = self.activity.candidates(self.dead_after_tokens, limit)
            if candidates is not None:
                residual = y - result.reconstructions[-1]
                aux = passes.aux_fvu(x, residual, self.weights, *candidates, k=self.activation.aux_k)
                loss = loss + self.activation.aux_coefficient * aux
        last = fvu(errors[-1].detach(), deviation, energy)
        return Step(loss, last, result.active / len(x)), result

    def _pass(self, x: Tensor, y: Tensor, progress: float) -> Pass:
        activation = self.activation
        if isinstance(activation, TopK) and self._is_sparse(activation, x.device.type):
            return passes.sparse_pass(x, self.weights, activation)
        return passes.dense_pass(x, y, self.weights, activation, progress)

    def _is_sparse(self, activation: TopK, device: str) -> bool:
        """By choice, or where few latents are active and finding them does not wait for the device."""
        if self.kernel != "auto":
            return self.kernel == "sparse"
        waits = isinstance(activation, BatchTopK) and device != "cpu"  # the number of candidates varies
        return 16 * activation.k <= self.d_sae and not waits

    def encode_served(self, batch: Batch) -> Tensor:
        """Latents `(batch, d_sae)` of a data module's batch, which is normalised already."""
        return passes.encode(self.read.from_served(batch), self.weights, self.activation)

    @property
    def dead_after_tokens(self) -> int:
        """Rows of silence after which a latent counts as dead."""
        given: int | None = self.hparams["dead_after_tokens"]
        if given is not None:
            return given
        return min(DEAD_AFTER_TOKENS, self.planned_tokens // 10) if self.planned_tokens else DEAD_AFTER_TOKENS

    def scalars(self, step: Step) -> dict[str, Tensor]:
        """What a logging step shows, on the CPU after one transfer, averaged over ranks."""
        values = torch.stack([step.loss.detach(), step.fvu, step.l0]).float()
        dead = self.activity.dead_fraction(self.dead_after_tokens)
        loss, fvu_, l0, dead, skipped = torch.stack(
            [*mean_over_ranks(values), dead, self.nonfinite_rows.float()]
        ).cpu()
        if self.on_nonfinite == "stop":
            raise_if_counted(skipped)
        named = {"loss": loss, "fvu": fvu_, "l0": l0, "dead_fraction": dead}
        return named | ({"nonfinite_rows": skipped} if self.on_nonfinite == "skip" else {})

    def parameter_group(self) -> dict[str, Any]:
        """This SAE's parameters with its own settings of Adam."""
        o = self.optimization
        return {"params": list(self.parameters()), "lr": self.lr, "betas": o.betas, "eps": o.eps}

    def prepare_gradients(self, clip_norm: float | None = None) -> None:
        """Keep the decoder's gradient on the sphere, then clip to `clip_norm` or the SAE's own setting."""
        if self.activation.unit_norm and self.W_dec.grad is not None:
            initialize.remove_parallel(self.W_dec.grad, self.W_dec)
        clip_norm = self.optimization.clip_norm if clip_norm is None else clip_norm
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters(), clip_norm)

    def project(self) -> None:
        """Bring parameters back onto their constraints after an optimizer's step."""
        if self.activation.unit_norm:
            initialize.normalize_rows(self.W_dec)
        self.activation.project()

    def new_metrics(self) -> HeldOutMetrics:
        """Empty sums for held-out rows."""
        return HeldOutMetrics(self.d_sae, self.write.width, self.device)

    @torch.no_grad()
    def measure(self, batch: Batch, metrics: HeldOutMetrics) -> None:
        """Add a served batch of held-out rows to `metrics`."""
        x, y = self.rows(batch)
        latents = passes.encode(x, self.weights, self.activation)
        metrics.update(y, passes.reconstruct(x, latents, self.weights), latents)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the SAE was trained on, for exports."""
        checkpoint["trained_on"] = dict(self.trained_on)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another architecture or size, in one sentence."""
        check_checkpoint(dict(self.hparams), checkpoint.get("hyper_parameters", {}))
        self.trained_on = dict(checkpoint.get("trained_on", {}))

    def spliced(self, model: PreTrainedModel, hook: str) -> AbstractContextManager[PreTrainedModel]:
        """Run `model` with what the SAE makes of it at a hook point in its place: `with sae.spliced(model, name):`.

        Args:
            model: a whole Hugging Face model.
            hook: canonical name, TransformerLens name or module path.

        Raises:
            ValueError: it does not write what it reads (a transcoder, a crosscoder).
        """
        if self.is_transcoder or len(self.read.hooks) > 1:
            raise ValueError(
                "only an autoencoder of one hook point can take its place; splice what you need with spliced()"
            )
        return spliced(model, hook, self)

    # ---- other libraries

    def export_saelens(
        self, folder: str | Path, *, metadata: Mapping[str, Any] | None = None, overwrite: bool = False
    ) -> Path:
        """Write a folder that `sae_lens.SAE.load_from_disk` reads, see `interop.saelens`."""
        return saelens.export_saelens(self, folder, metadata=metadata, overwrite=overwrite)

    from_saelens = staticmethod(saelens.from_saelens)
    from_dictionary_learning = staticmethod(others.from_dictionary_learning)
    from_sparsify = staticmethod(others.from_sparsify)
    from_deeplens = staticmethod(others.from_deeplens)
