"""`TopActivatingTokens`: collect the text on which latents fire most strongly, in training or in a validation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from deeplens_lightning.activation_data import ActivationData, activation_data
from deeplens_lightning.callbacks.sae_view import SaeView, require_sae
from deeplens_lightning.callbacks.support import Every, RawRows, add_written, evaluation_mode
from deeplens_lightning.callbacks.token_contexts import Context, ContextReader
from deeplens_lightning.callbacks.top_rows import TopRow, TopRows
from deeplens_lightning.reporting.loggers import log_table
from deeplens_lightning.reporting.readable_tokens import readable
from deeplens_lightning.reporting.run_folder import run_folder, write_json

_REFRESH_EVERY = 16  # encoded batches between two times that the kept rows are encoded again


class TopActivatingTokens(Callback):
    """Keeps the rows on which chosen latents fire most strongly, and writes them with their text at the end.

    In a fit one training batch every `every_n_steps` optimizer steps is encoded, in `trainer.validate` every batch of
    held-out rows. At the end, the text around each kept row is found through the data module's provenance. Where the
    data module has a model, every token of that text gets its own activation. Only rank 0 works, on the rows that it
    served. Written in the run's folder: `top_tokens/latents.json`; a table goes to loggers that show tables.

    Args:
        latents: numbers of the latents to watch, or how many to choose at random.
        keep: number of rows to keep for each latent, at least 1.
        every_n_steps: optimizer steps between two training batches that are encoded; each costs one `encode`.
        before: number of tokens to show before the row's own, at least 0.
        after: number of tokens to show after it, at least 0.
        seed: seed of the random choice of latents.
        sae: name of one SAE of a module that trains several, such as `k=32`; default the first.

    Raises:
        ValueError: a value outside its range, or a latent that the SAE does not have. At the start: a data module
            without provenance.
        TypeError: at the start: the module has no `encode` or no `decode`.
    """

    def __init__(
        self,
        latents: int | Sequence[int] = 32,
        keep: int = 8,
        every_n_steps: int = 16,
        *,
        before: int = 24,
        after: int = 8,
        seed: int = 0,
        sae: str | None = None,
    ) -> None:
        if keep < 1 or (isinstance(latents, int) and latents < 1) or latents == []:
            raise ValueError(
                f"latents={latents} and keep={keep} must name at least one latent and one context"
            )
        if before < 0 or after < 0:
            raise ValueError(f"before={before} and after={after} are numbers of tokens, not negative")
        self.latents = latents
        self.keep = keep
        self.before = before
        self.after = after
        self.seed = seed
        self.sae = sae
        self.written: list[Path] = []
        self._every = Every(every_n_steps)
        self._raw = RawRows()
        self._encoded = 0
        self._unknown = False  # whether the data module did not know a batch
        self._path: Path | None = None
        self._top: TopRows | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage in ("fit", "validate"):
            self._path = run_folder(trainer) / "top_tokens" / "latents.json"
            self._raw, self._top, self._encoded, self._unknown = RawRows(), None, 0, False

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check before the first batch that there is an SAE, and a data module with provenance."""
        self._find_sae(trainer, pl_module)
        if not isinstance(trainer.datamodule, ActivationData):  # type: ignore[attr-defined]
            raise ValueError(
                "TopActivatingTokens needs a data module that says where rows came from: use an "
                "ActivationDataModule, or inherit from ActivationData and write provenance(batch)"
            )

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._every.due(trainer.global_step):
            self._watch(trainer, pl_module, batch)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        short = f"the fit ended at step {trainer.global_step}, before every_n_steps={self._every.n}"
        self._finish(trainer, pl_module, short)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self.on_fit_start(trainer, pl_module)

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
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._watch(trainer, pl_module, batch)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._finish(trainer, pl_module, "there are no held-out rows")

    def _watch(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Encode a batch on rank 0, and keep its rows on which the latents fire most strongly."""
        if not trainer.is_global_zero:
            return
        provenance = self._provenance(trainer, batch)
        if provenance is None:
            return
        sae = self._find_sae(trainer, pl_module)
        with evaluation_mode(pl_module):
            rows = self._raw.of(trainer, batch, sae.reads)
            if self._top is None:
                one_row = sae.encode({name: x[:1] for name, x in rows.items()})
                self._top = TopRows(self._choose(one_row), self.keep)
            self._top.add(rows, self._top.watched(sae.encode_parts(rows)), provenance)
            self._encoded += 1
            if self._encoded % _REFRESH_EVERY == 0:
                self._top.refresh(sae.encode_parts)

    def _finish(self, trainer: Trainer, pl_module: LightningModule, short: str) -> None:
        """Write what was kept on rank 0, or say why there is nothing: `short` where no batch was encoded."""
        if not trainer.is_global_zero or self._path is None:
            return
        if self._top is None:
            self._say_empty("their provenance is unknown" if self._unknown else short)
            return
        sae = self._find_sae(trainer, pl_module)
        with evaluation_mode(pl_module):
            self._top.refresh(sae.encode_parts)
            rows = self._top.firing()
            if rows and all(row.token_id < 0 for row in rows):
                self._say_empty("the data have no token ids, as in shards that hold bare tensors")
                return
            self._write(trainer, sae, self._top, rows, self._path)

    def _provenance(self, trainer: Trainer, batch: Any) -> Tensor | None:
        """Provenance of a batch, int64 `(batch, 4)` as `TopRows.add` needs it; None, with a warning, if unknown."""
        data = activation_data(trainer)
        found = data.provenance(batch)
        if found is not None:
            return found.stacked().to(torch.int64)
        if not self._unknown:
            self._unknown = True
            rank_zero_warn(
                f"{type(data).__name__}.provenance(batch) returned None for a training batch, so TopActivatingTokens "
                "leaves its rows out. ActivationDataModule does not recognise a batch that other code replaced, such "
                "as an overridden on_after_batch_transfer without super(); a data module of your own must override "
                "provenance"
            )
        return None

    def _say_empty(self, reason: str) -> None:
        rank_zero_info(f"TopActivatingTokens has no rows to show: {reason}")

    def _find_sae(self, trainer: Trainer, module: LightningModule) -> SaeView:
        return require_sae(module, activation_data(trainer).hook_names, "TopActivatingTokens", self.sae)

    def _choose(self, latents: Tensor) -> Tensor:
        d_sae = latents.shape[1]
        if isinstance(self.latents, int):
            drawn = np.random.default_rng(self.seed).permutation(d_sae)[: self.latents]
            return _on_device(sorted(drawn.tolist()), latents.device)
        wrong = [i for i in self.latents if not 0 <= i < d_sae]
        if wrong:
            raise ValueError(f"latents={wrong} do not exist: this SAE has latents 0 to {d_sae - 1}")
        return _on_device(self.latents, latents.device)

    def _write(
        self, trainer: Trainer, sae: SaeView, top: TopRows, rows: Sequence[TopRow], path: Path
    ) -> None:
        contexts = ContextReader(activation_data(trainer), sae, self.before, self.after).read(rows)
        entries = []
        table: list[list[str | int | float | None]] = []
        for i, latent in enumerate(top.latents.tolist()):
            own = [context for row, context in zip(rows, contexts, strict=True) if row.latent == latent]
            own.sort(key=lambda context: -context.value)
            frequency = int(top.fired[i]) / top.seen
            entries.append(
                {"latent": latent, "frequency": frequency, "contexts": [context.as_json() for context in own]}
            )
            table += [[latent, frequency, context.value, _line(context)] for context in own]
        found = {"step": trainer.global_step, "rows": top.seen, "reads": list(sae.reads), "latents": entries}
        write_json(path, found)
        add_written(self.written, path)
        columns = ["latent", "frequency", "activation", "context"]
        log_table(trainer.loggers, "top_tokens", columns, table, trainer.global_step)


def _on_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(list(numbers)).to(device, non_blocking=True)


def _line(context: Context) -> str:
    """The context on one line, with the row's own token in «guillemets»."""
    shown = [readable(token) for token in context.tokens]
    shown[context.peak] = f"«{shown[context.peak]}»"
    return " ".join(shown)
