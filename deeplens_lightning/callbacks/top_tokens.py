"""`TopActivatingTokens`: collect the text on which each latent fires most strongly, in training or in a validation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from deeplens_lightning.activation_data import ActivationData, activation_data
from deeplens_lightning.callbacks.context_search import (
    FoundContexts,
    LatentContexts,
    NoContextsError,
    choose_latents,
    heldout_rows,
    search,
)
from deeplens_lightning.callbacks.sae_view import SaeView, require_sae
from deeplens_lightning.callbacks.support import Every, RawRows, SaeObserver, add_written, evaluation_mode
from deeplens_lightning.callbacks.token_contexts import Context, ContextReader
from deeplens_lightning.callbacks.top_rows import TopRow, TopRows
from deeplens_lightning.reporting.loggers import Cell, log_table
from deeplens_lightning.reporting.readable_tokens import readable
from deeplens_lightning.reporting.run_folder import write_json

_REFRESH_EVERY = 16  # encoded batches between two times that the kept rows are encoded again


class TopActivatingTokens(SaeObserver):
    """Keeps the rows on which chosen latents fire most strongly, and writes them with their text at the end.

    One training batch every `every_n_steps` optimizer steps is encoded. At the end of the fit, the text around each
    kept row is found through the data module's provenance. Where the data module has a model, every token of that text
    gets its own activation. Only rank 0 works, on the rows that it served. A checkpoint has the kept rows, and a resumed
    fit goes on with them. `trainer.validate` searches the held-out rows instead. Written in the run's folder:
    `top_tokens/latents.json`, with `sae` `top_tokens-<sae>/latents.json`; a table goes to loggers that show tables.

    Args:
        latents: numbers of the latents to watch, or how many to choose at random.
        keep: number of rows to keep for each latent, at least 1.
        every_n_steps: optimizer steps between two batches that are encoded; each costs one `encode`.
        before: number of tokens to show before the row's own, at least 0.
        after: number of tokens to show after it, at least 0.
        seed: seed of the random choice of latents.
        sae: name of one SAE of a module that trains several, such as `k=32`; default the first.

    Raises:
        ValueError: a value outside its range, or a latent that the SAE does not have. At the start of a fit: a data
            module without provenance, or another callback writes to the same folder.
        TypeError: at the start of a fit: the module has no `encode` or no `decode`.
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
        super().__init__("top_tokens", sae)
        self.latents = latents
        self.keep = keep
        self.before = before
        self.after = after
        self.seed = seed
        self._every = Every(every_n_steps)
        self._raw = RawRows()
        self._encoded = 0
        self._unknown = False  # whether the data module did not know a batch
        self._path: Path | None = None
        self._top: TopRows | None = None
        self._loaded: dict[str, Any] | None = None  # from the checkpoint that the fit continues from

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage in ("fit", "validate"):
            self._path = self.find_place(trainer) / "latents.json"
            self._raw, self._top, self._encoded, self._unknown = RawRows(), None, 0, False
            self._loaded = None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check before the first step that there is an SAE, and a data module with provenance."""
        self._find_sae(trainer, pl_module)
        if not isinstance(trainer.datamodule, ActivationData):  # type: ignore[attr-defined]
            raise ValueError(
                "TopActivatingTokens needs a data module that says where rows came from: use an "
                "ActivationDataModule, or inherit from ActivationData and write provenance(batch)"
            )

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._top is not None:
            state = {"asked": self._asked, "encoded": self._encoded, "top": self._top.state()}
            checkpoint.setdefault("top_tokens", {})[self.place] = state

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._loaded = checkpoint.get("top_tokens", {}).get(self.place)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the rows of the checkpoint."""
        if self._loaded is None:
            return
        if self._loaded["asked"] != self._asked:
            rank_zero_info(
                f"TopActivatingTokens starts anew at step {trainer.global_step}: the checkpoint has rows for other "
                "latents, or another keep"
            )
            return
        self._encoded = self._loaded["encoded"]
        self._top = TopRows.restored(self._loaded["top"], pl_module.device)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._every.due(trainer.global_step) or not trainer.is_global_zero:
            return
        provenance = self._provenance(trainer, batch)
        if provenance is None:
            return
        sae = self._find_sae(trainer, pl_module)
        with evaluation_mode(pl_module):
            rows = self._raw.of(trainer, batch, sae.reads)
            if self._top is None:
                one_row = sae.encode({name: x[:1] for name, x in rows.items()})
                chosen = torch.tensor(choose_latents(self.latents, one_row.shape[1], self.seed))
                self._top = TopRows(chosen.to(one_row.device, non_blocking=True), self.keep)
            self._top.add(rows, self._top.watched(sae.encode_parts(rows)), provenance)
            self._encoded += 1
            if self._encoded % _REFRESH_EVERY == 0:
                self._top.refresh(sae.encode_parts)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or self._path is None:
            return
        if self._top is None:
            short = f"the fit ended at step {trainer.global_step}, before every_n_steps={self._every.n}"
            self._say_empty("their provenance is unknown" if self._unknown else short)
            return
        sae = self._find_sae(trainer, pl_module)
        with evaluation_mode(pl_module):
            self._top.refresh(sae.encode_parts)
            rows = self._top.firing()
            if rows and all(row.token_id < 0 for row in rows):
                self._say_empty("the data have no token ids, as in shards that hold bare tensors")
                return
            self._write(trainer, self._trained(trainer, sae, self._top, rows), self._path)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search the held-out rows in `trainer.validate`; in a fit the training rows are searched."""
        if trainer.state.fn != TrainerFn.VALIDATING or not trainer.is_global_zero or self._path is None:
            return
        sae = self._find_sae(trainer, pl_module)
        try:
            with evaluation_mode(pl_module):
                found = search(
                    sae,
                    heldout_rows(trainer, sae.reads),
                    self.latents,
                    keep=self.keep,
                    before=self.before,
                    after=self.after,
                    tokenizer=activation_data(trainer).tokenizer,
                    seed=self.seed,
                )
        except NoContextsError as error:
            self._say_empty(str(error))
            return
        self._write(trainer, found, self._path)

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

    @property
    def _asked(self) -> dict[str, Any]:
        """The settings that the kept rows depend on."""
        latents = self.latents if isinstance(self.latents, int) else list(self.latents)
        return {"latents": latents, "keep": self.keep, "seed": self.seed}

    def _trained(self, trainer: Trainer, sae: SaeView, top: TopRows, rows: Sequence[TopRow]) -> FoundContexts:
        """The kept training rows with their text."""
        contexts = ContextReader(activation_data(trainer), sae, self.before, self.after).read(rows)
        of_latent: dict[int, list[Context]] = {latent: [] for latent in top.latents.tolist()}
        for row, context in zip(rows, contexts, strict=True):
            of_latent[row.latent].append(context)
        return FoundContexts(
            sae=sae.name,
            reads=sae.reads,
            rows=top.seen,
            latents=[
                LatentContexts(
                    latent=latent,
                    frequency=int(fired) / top.seen,
                    contexts=sorted(own, key=lambda context: -context.value),
                )
                for (latent, own), fired in zip(of_latent.items(), top.fired, strict=True)
            ],
        )

    def _write(self, trainer: Trainer, found: FoundContexts, path: Path) -> None:
        write_json(path, found.as_json(trainer.global_step))
        add_written(self.written, path)
        columns = ["latent", "frequency", "activation", "context"]
        table: list[list[Cell]] = [
            [each.latent, each.frequency, context.value, _line(context)]
            for each in found.latents
            for context in each.contexts
        ]
        log_table(trainer.loggers, self.metric("top_tokens"), columns, table, trainer.global_step)


def _line(context: Context) -> str:
    """The context on one line, with the row's own token in «guillemets»."""
    shown = [readable(token) for token in context.tokens]
    shown[context.peak] = f"«{shown[context.peak]}»"
    return " ".join(shown)
