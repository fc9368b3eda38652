"""`LatentStatistics`: count how often each latent fires, on held-out rows and during training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from deeplens_lightning.activation_data import activation_data
from deeplens_lightning.callbacks.sae_view import SaeView, require_sae
from deeplens_lightning.callbacks.support import Every, RawRows, SaeObserver, add_written, evaluation_mode
from deeplens_lightning.distributed import max_over_ranks, sum_over_ranks
from deeplens_lightning.reporting.figures import figure_pixels, plot_firing_histogram, save_pixels
from deeplens_lightning.reporting.loggers import log_image, log_scalars
from deeplens_lightning.reporting.run_folder import append_jsonl, write_json


class LatentStatistics(SaeObserver):
    """Counts for each latent the number of rows on which it is above 0.

    It counts held-out rows during validation. During training it counts the rows of one batch every `every_n_steps`
    optimizer steps; these counts start again after each report. It reports after each validation, and at the end of
    a fit without validation. Counts are summed over ranks.

    Logged: `latents/dead_fraction` (share of latents that fired on none of the counted rows),
    `latents/dense_fraction` (share that fired on more than `dense_above` of them) and `latents/rows` (number of rows
    counted); of the held-out rows where there are any, else of the training rows. Written in the run's folder:
    `latent_statistics/latest.json` with the counts of all latents, `latent_statistics/history.jsonl`, and a histogram
    `latent_statistics/step_<step>.png`. With `sae`, names of metrics end with `/<sae>`, and the folder is
    `latent_statistics-<sae>`.

    Args:
        every_n_steps: optimizer steps between two training batches that are counted; each costs one `encode`.
        max_rows: held-out rows to encode in each validation, on each rank; the last batch is taken whole. With 0 only
            training rows are counted.
        dense_above: share of rows, above 0 and at most 1, above which a latent counts as dense.
        sae: name of one SAE of a module that trains several, such as `k=32`; default the first.

    Raises:
        ValueError: a value outside its range. At the start: another callback writes to the same folder.
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
        super().__init__("latent_statistics", sae)
        self.max_rows = max_rows
        self.dense_above = dense_above
        self._every = Every(every_n_steps)
        self._training = _Counter()
        self._heldout = _Counter()
        self._raw = RawRows()
        self._folder: Path | None = None
        self._reported = -1
        self._sae = ""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._folder = self.find_place(trainer)
        self._raw, self._reported = RawRows(), -1

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._every.due(trainer.global_step):
            self._count(self._training, trainer, pl_module, batch)

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._heldout = _Counter()

    @override
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any, **__: Any
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

    def _count(self, counter: _Counter, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        sae = require_sae(module, activation_data(trainer).hook_names, "LatentStatistics", self.sae)
        self._sae = sae.name
        with evaluation_mode(module):
            counter.add(sae, self._raw.of(trainer, batch, sae.reads))

    def _report(self, trainer: Trainer) -> None:
        """Sum the counts over ranks, then log and write them on rank 0. A collective: every rank calls it."""
        step, self._reported = trainer.global_step, trainer.global_step
        device = trainer.strategy.root_device
        heldout, training = self._heldout.total(device), self._training.total(device)
        self._heldout, self._training = _Counter(), _Counter()
        found = {
            name: total for name, total in (("heldout", heldout), ("training", training)) if total is not None
        }
        if not found or not trainer.is_global_zero:
            return
        assert self._folder is not None
        name, shown = next(iter(found.items()))
        frequencies = shown.counts / shown.rows
        figures = {
            "dead_fraction": int((shown.counts == 0).sum()) / len(shown.counts),
            "dense_fraction": int((frequencies > self.dense_above).sum()) / len(shown.counts),
            "rows": float(shown.rows),
        }
        scalars = {self.metric(f"latents/{metric}"): value for metric, value in figures.items()}
        data = {name: {"rows": total.rows, "counts": total.counts.tolist()} for name, total in found.items()}
        write_json(self._folder / "latest.json", {"step": step, "sae": self._sae, **data})
        append_jsonl(self._folder / "history.jsonl", [{"step": step, "on": name, **figures}])
        title = f"Firing frequencies at step {step}, {shown.rows} {name} rows"
        pixels = figure_pixels(plot_firing_histogram(frequencies, title))
        save_pixels(pixels, self._folder / f"step_{step:08d}.png")
        log_scalars(trainer.loggers, scalars, step)
        log_image(trainer.loggers, self.metric("latents/firing_frequencies"), pixels, step)
        trainer.callback_metrics.update({metric: torch.tensor(value) for metric, value in scalars.items()})
        add_written(self.written, self._folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Total:
    """Counts of all ranks.

    Attributes:
        counts: int64 `(d_sae,)` on the CPU: rows on which each latent fired.
        rows: number of rows counted.
    """

    counts: Tensor
    rows: int


class _Counter:
    """Count rows, and on how many of them each latent fires; on the SAE's device, without waiting for it."""

    def __init__(self) -> None:
        self.rows = 0
        self.fired: Tensor | None = None

    def add(self, sae: SaeView, rows: dict[str, Tensor]) -> None:
        """Encode a batch of raw rows and add it to the counts."""
        for latents in sae.encode_parts(rows):
            fired = (latents > 0).sum(0)
            self.fired = fired if self.fired is None else self.fired + fired
        self.rows += len(next(iter(rows.values())))

    def total(self, device: torch.device) -> _Total | None:
        """Sum the counts of all ranks; None where no rank counted a row. A collective: every rank calls it."""
        fired = torch.zeros(0, dtype=torch.int64, device=device) if self.fired is None else self.fired
        width = int(max_over_ranks(fired.new_tensor([len(fired)])))  # a rank without rows does not have d_sae
        if width == 0:
            return None
        padded = fired if len(fired) else fired.new_zeros(width)
        total = sum_over_ranks(torch.cat([padded, padded.new_tensor([self.rows])])).cpu()
        return _Total(counts=total[:-1], rows=int(total[-1]))
