"""`TopActivatingTokens`: the contexts in which a latent was strongest during training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from deeplens_lightning.callbacks.sae_view import SaeView, require_sae
from deeplens_lightning.callbacks.support import (
    Every,
    datamodule_of,
    hook_names,
    observing,
    raw_rows,
    remember,
)
from deeplens_lightning.callbacks.token_contexts import Context, ContextReader
from deeplens_lightning.callbacks.top_rows import Strongest
from deeplens_lightning.reporting.loggers import log_table
from deeplens_lightning.reporting.readable_tokens import readable
from deeplens_lightning.reporting.run_folder import run_folder, write_json

_REFRESH_EVERY = 16  # looks between two times that values are taken again from the SAE as it is now


class TopActivatingTokens(Callback):
    """Keeps the rows on which some latents fire strongest, and writes them with their text at the end.

    Every `every_n_steps`-th training batch is encoded once more. At the end of the fit the text around each
    row comes from the data module through its provenance, and where the data module has a live model, every
    token of the context gets its own activation. Written on rank 0, of the rows that rank saw:
    `top_tokens/latents.json`, and a table for loggers that show tables.

    Args:
        latents: numbers of the latents to watch, or how many to draw at random.
        keep: contexts per latent.
        every_n_steps: optimizer steps between two batches that are looked at; each look costs one `encode`.
        before: tokens of context shown before the strongest one.
        after: tokens shown after it.
        seed: of the random choice.
        sae: which one, of several that train side by side; default the first.
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
        self._looks = 0
        self._path: Path | None = None
        self._strongest: Strongest | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._path = run_folder(trainer) / "top_tokens" / "latents.json"
            self._strongest, self._looks = None, 0

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        require_sae(pl_module, hook_names(trainer), "TopActivatingTokens", self.sae)
        if not callable(getattr(datamodule_of(trainer), "provenance", None)):
            raise ValueError(
                "TopActivatingTokens needs a data module that says where rows came from, "
                "provenance(batch), as ActivationDataModule does"
            )

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._every.due(trainer.global_step) or not trainer.is_global_zero:
            return
        provenance = _provenance(trainer, batch)
        if provenance is None:
            return
        sae = require_sae(pl_module, hook_names(trainer), "TopActivatingTokens", self.sae)
        with observing(pl_module):
            rows = raw_rows(trainer, batch, sae.reads)
            latents = sae.encode(rows)
            if self._strongest is None:
                self._strongest = Strongest(self._choose(latents), self.keep)
            self._strongest.add(rows, latents[:, self._strongest.latents], provenance)
            self._looks += 1
            if self._looks % _REFRESH_EVERY == 0:
                self._strongest.refresh(sae.encode)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or self._path is None:
            return
        if self._strongest is None:
            rank_zero_info(
                "TopActivatingTokens saw no rows with provenance: the fit was shorter than every_n_steps="
                f"{self._every.n}, or the data module knows none (bare shards)"
            )
            return
        sae = require_sae(pl_module, hook_names(trainer), "TopActivatingTokens", self.sae)
        with observing(pl_module):
            self._strongest.refresh(sae.encode)
            self._write(trainer, sae, self._strongest)

    def _choose(self, latents: Tensor) -> Tensor:
        d_sae = latents.shape[1]
        if isinstance(self.latents, int):
            drawn = np.random.default_rng(self.seed).permutation(d_sae)[: self.latents]
            return torch.tensor(sorted(drawn.tolist()), device=latents.device)
        wrong = [i for i in self.latents if not 0 <= i < d_sae]
        if wrong:
            raise ValueError(f"latents={wrong} do not exist: this SAE has latents 0 to {d_sae - 1}")
        return torch.tensor(list(self.latents), device=latents.device)

    def _write(self, trainer: Trainer, sae: SaeView, strongest: Strongest) -> None:
        reader = ContextReader(datamodule_of(trainer), sae, self.before, self.after)
        entries = []
        table: list[list[str | int | float | None]] = []
        values, provenance = strongest.values.cpu(), strongest.provenance.cpu()
        wanted = [
            (int(latent), float(values[i, j]), provenance[i, j].tolist())
            for i, latent in enumerate(strongest.latents.tolist())
            for j in range(values.shape[1])
            if values[i, j] > 0
        ]
        contexts = reader.read(wanted)
        for i, latent in enumerate(strongest.latents.tolist()):
            own = [
                context for (owner, _, _), context in zip(wanted, contexts, strict=True) if owner == latent
            ]
            own.sort(key=lambda context: -context.value)
            frequency = int(strongest.fired[i]) / strongest.seen
            entries.append(
                {"latent": latent, "frequency": frequency, "contexts": [context.as_json() for context in own]}
            )
            table += [[latent, frequency, context.value, _line(context)] for context in own]
        assert self._path is not None
        write_json(
            self._path,
            {
                "step": trainer.global_step,
                "rows": strongest.seen,
                "reads": list(sae.reads),
                "latents": entries,
            },
        )
        remember(self.written, self._path)
        columns = ["latent", "frequency", "activation", "context"]
        log_table(trainer.loggers, "top_tokens", columns, table, trainer.global_step)


def _provenance(trainer: Trainer, batch: Any) -> Tensor | None:
    """Int64 `(batch, 4)`: document hash, document index, position, token id; None where nobody knows."""
    found = datamodule_of(trainer).provenance(batch)  # type: ignore[union-attr]
    if found is None or bool((found.token_id < 0).all()):
        return None
    columns = (found.document_hash, found.document_index, found.position, found.token_id)
    return torch.stack([column.to(torch.int64) for column in columns], dim=1)


def _line(context: Context) -> str:
    shown = [readable(token) for token in context.tokens]
    shown[context.peak] = f"«{shown[context.peak]}»"
    return " ".join(shown)
