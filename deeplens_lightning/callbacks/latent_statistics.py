"""`LatentStatistics`: how often each latent fires, on held-out rows and while training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from deeplens_lightning.callbacks.sae_view import SaeView, require_sae
from deeplens_lightning.callbacks.support import Every, hook_names, observing, raw_rows, remember
from deeplens_lightning.distributed import max_over_ranks, sum_over_ranks
from deeplens_lightning.reporting.figures import figure_pixels, plot_firing_histogram, save_pixels
from deeplens_lightning.reporting.loggers import log_image, log_scalars
from deeplens_lightning.reporting.run_folder import append_jsonl, run_folder, write_json


class LatentStatistics(Callback):
    """Counts on how many rows each latent is above 0.

    At validation over held-out rows, and in training over every `every_n_steps`-th batch since the last
    report; reported at validation, or at the end of a fit that has none. Logged: `latents/dead_fraction`
    (fired on none of the counted rows), `latents/dense_fraction` (on more than `dense_above` of them),
    `latents/rows` (how many were counted). Written: `latent_statistics/latest.json` with the counts of
    all latents, `history.jsonl`, and a histogram `step_<step>.png`. Counts are summed over ranks.

    Args:
        every_n_steps: optimizer steps between two training batches that are encoded once more.
        max_rows: held-out rows encoded per validation and rank.
        dense_above: the share of rows above which a latent counts as dense.
        sae: which one, of several that train side by side; default the first.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        max_rows: int = 65_536,
        dense_above: float = 0.1,
        *,
        sae: str | None = None,
    ) -> None:
        if max_rows < 0:
            raise ValueError(f"max_rows={max_rows} must not be negative; 0 counts training rows alone")
        if not 0 < dense_above <= 1:
            raise ValueError(f"dense_above={dense_above} is a share of rows, above 0 and at most 1")
        self.max_rows = max_rows
        self.dense_above = dense_above
        self.sae = sae
        self.written: list[Path] = []
        self._every = Every(every_n_steps)
        self._training = _Counts()
        self._heldout = _Counts()
        self._folder: Path | None = None
        self._reported = -1

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._folder = run_folder(trainer) / "latent_statistics"
        self._reported = -1

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._every.due(trainer.global_step):
            self._count(self._training, trainer, pl_module, batch)

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._heldout = _Counts()

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not trainer.sanity_checking and self._heldout.rows < self.max_rows:
            self._count(self._heldout, trainer, pl_module, batch)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._report(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._reported != trainer.global_step:
            self._report(trainer)

    def _count(self, counts: _Counts, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        sae = require_sae(module, hook_names(trainer), "LatentStatistics", self.sae)
        with observing(module):
            counts.add(sae, raw_rows(trainer, batch, sae.reads))

    def _report(self, trainer: Trainer) -> None:
        """Every rank takes part: which counts there are is the same on all of them."""
        step, self._reported = trainer.global_step, trainer.global_step
        device = trainer.strategy.root_device
        heldout, training = self._heldout.reduced(device), self._training.reduced(device)
        self._heldout, self._training = _Counts(), _Counts()
        found = {name: c for name, c in (("heldout", heldout), ("training", training)) if c is not None}
        if not found or not trainer.is_global_zero:
            return
        assert self._folder is not None
        counts, rows = found.get("heldout") or found["training"]
        frequencies = counts / rows
        scalars = {
            "latents/dead_fraction": float((counts == 0).double().mean()),
            "latents/dense_fraction": float((frequencies > self.dense_above).double().mean()),
            "latents/rows": float(rows),
        }
        data = {name: {"rows": c[1], "counts": c[0].tolist()} for name, c in found.items()}
        write_json(self._folder / "latest.json", {"step": step, **data})
        line = {name.removeprefix("latents/"): value for name, value in scalars.items()}
        append_jsonl(self._folder / "history.jsonl", [{"step": step, "on": next(iter(found)), **line}])
        title = f"Firing frequencies at step {step}, {rows} {next(iter(found))} rows"
        pixels = figure_pixels(plot_firing_histogram(frequencies, title))
        save_pixels(pixels, self._folder / f"step_{step:08d}.png")
        log_scalars(trainer.loggers, scalars, step)
        log_image(trainer.loggers, "latents/firing_frequencies", pixels, step)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in scalars.items()})
        remember(self.written, self._folder)


class _Counts:
    """Rows seen, and on how many of them each latent fired; on the SAE's device, without a sync."""

    def __init__(self) -> None:
        self.rows = 0
        self.fired: Tensor | None = None

    def add(self, sae: SaeView, rows: dict[str, Tensor]) -> None:
        """Encode and count a batch."""
        fired = (sae.encode(rows) > 0).sum(0)
        self.fired = fired if self.fired is None else self.fired + fired
        self.rows += len(next(iter(rows.values())))

    def reduced(self, device: torch.device) -> tuple[Tensor, int] | None:
        """Counts `(d_sae,)` and rows of all ranks, on the CPU; None where no rank counted anything.

        A collective: a rank whose share of the rows was empty does not know d_sae, and takes part.
        """
        fired = torch.zeros(0, dtype=torch.int64, device=device) if self.fired is None else self.fired
        width = int(max_over_ranks(fired.new_tensor([len(fired)])))
        if width == 0:
            return None
        padded = fired if len(fired) else fired.new_zeros(width)
        total = sum_over_ranks(torch.cat([padded, padded.new_tensor([self.rows])])).cpu()
        return total[:-1], int(total[-1])
