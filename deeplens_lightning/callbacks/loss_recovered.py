"""`LossRecovered`: how much of the language model's loss survives the SAE's reconstruction.

On held-out text the model is run as it is, with the reconstruction spliced in, and with the
activations ablated (zero, and their mean): CE recovered is
`(ce_zero - ce_sae) / (ce_zero - ce_clean)`, the "loss recovered" of Bricken et al. 2023.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import AutoModelForCausalLM, PreTrainedModel
from typing_extensions import override

from deeplens_lightning.callbacks.sae_view import SaeView, require_sae
from deeplens_lightning.callbacks.segments import Segments, from_blocks, from_token_ids
from deeplens_lightning.callbacks.spliced_loss import measure
from deeplens_lightning.callbacks.support import datamodule_of, hook_names, observing, remember
from deeplens_lightning.model.hook_points import HookPoint, resolve
from deeplens_lightning.model.pretrained import locate
from deeplens_lightning.model.single_text import TextActivations
from deeplens_lightning.reporting.loggers import log_scalars
from deeplens_lightning.reporting.run_folder import append_jsonl, run_folder
from deeplens_lightning.text.packing import Blocks
from deeplens_lightning.types import device_of


class LossRecovered(Callback):
    """Measures next-token loss with the reconstruction spliced in, at validation and at the end.

    Only the positions that the SAE is trained on are replaced, and only they are scored (where the next
    token belongs to the same segment). Logged, in nats per token: `val/ce_clean`, `val/ce_sae`,
    `val/ce_zero`, `val/ce_mean`, `val/kl` (from the clean to the spliced prediction), and
    `val/ce_recovered`, 1 for a perfect reconstruction and 0 for zeros. Written: `loss_recovered.jsonl`.

    The whole model, head included, is loaded once, when first needed, on rank 0, which measures alone
    and tells the other ranks.

    Args:
        rows: held-out rows to measure on, asked of the data module; the last segment is taken whole. A few
            hundred are too few: what ablation costs is then smaller than what texts differ by.
        batch_size: segments to a model batch.
        texts: measure on these instead, e.g. with cached shards, which hold no text.
        hf_model: default the data module's.
        device: of the whole model; `auto` is the data module's model's, else the SAE's.
        model_kwargs: for `from_pretrained`; default the data module's.
        sae: which one, of several that train side by side; default the first.
    """

    def __init__(
        self,
        rows: int = 8192,
        batch_size: int = 8,
        *,
        texts: Sequence[str] = (),
        hf_model: str | PreTrainedModel | None = None,
        device: str = "auto",
        model_kwargs: dict[str, Any] | None = None,
        sae: str | None = None,
    ) -> None:
        if rows < 1 or batch_size < 1:
            raise ValueError(f"rows={rows} and batch_size={batch_size} must be at least 1")
        if isinstance(texts, str):
            raise TypeError("texts must be a list of texts, got one string")
        self.rows = rows
        self.batch_size = batch_size
        self.texts = tuple(texts)
        self.hf_model = hf_model
        self.device = device
        self.model_kwargs = model_kwargs
        self.sae = sae
        self.written: list[Path] = []
        self._path: Path | None = None
        self._model: PreTrainedModel | None = None
        self._batches: list[Segments] = []
        self._ablated: dict[str, float] = {}
        self._measured = -1

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._path = run_folder(trainer) / "loss_recovered.jsonl"
        self._measured = -1

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find what is missing before the first step; nothing is loaded yet."""
        require_sae(pl_module, hook_names(trainer), "LossRecovered", self.sae)
        self._source(datamodule_of(trainer))
        self._blocks(datamodule_of(trainer))

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            for name, value in self._shared(trainer, pl_module).items():
                pl_module.log(name, value, sync_dist=True, batch_size=1)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._measured != trainer.global_step:
            values = self._shared(trainer, pl_module)
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
            if trainer.is_global_zero:
                log_scalars(trainer.loggers, values, trainer.global_step)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        self._model, self._batches, self._ablated = None, [], {}

    def _shared(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        """What rank 0 measures, on every rank: a checkpoint callback may monitor it."""
        self._measured = trainer.global_step
        values = self._measure(trainer, module) if trainer.is_global_zero else {}
        shared: dict[str, float] = trainer.strategy.broadcast(values)
        return shared

    def _measure(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        with observing(module):
            sae = require_sae(module, hook_names(trainer), "LossRecovered", self.sae)
            model, points = self._prepare(trainer, module, sae)
            with observing(model):
                values = measure(model, sae, points, self._batches, self._ablated, module.device)
        self._ablated = {name: values[name] for name in ("ce_zero", "ce_mean")}
        assert self._path is not None
        append_jsonl(self._path, [{"step": trainer.global_step} | values])
        remember(self.written, self._path)
        return {f"val/{name}": value for name, value in values.items() if name != "tokens"}

    def _prepare(
        self, trainer: Trainer, module: LightningModule, sae: SaeView
    ) -> tuple[PreTrainedModel, tuple[HookPoint, ...]]:
        datamodule = datamodule_of(trainer)
        if self._model is None:
            source = self._source(datamodule)
            kwargs = self.model_kwargs or getattr(datamodule, "model_kwargs", None)
            frozen = getattr(datamodule, "model", None)
            device = frozen.device if frozen is not None and self.device == "auto" else module.device
            self._model = whole_model(
                source, kwargs, device if self.device == "auto" else device_of(self.device)
            )
            self._batches = self._segments(datamodule, source, kwargs)
        if not any(bool(batch.scored.any()) for batch in self._batches):
            raise ValueError(
                "LossRecovered found no held-out token to score; raise rows or val_fraction, or pass "
                "texts=[...]"
            )
        return self._model, resolve(self._model, None, sae.hooks)

    def _segments(self, datamodule: Any, source: str | PreTrainedModel, kwargs: Any) -> list[Segments]:
        if self.texts:
            reader = TextActivations(
                source, tokenizer=getattr(datamodule, "tokenizer", None), model_kwargs=kwargs
            )
            read = [reader.token_ids(text) for text in self.texts]
            special = set(reader.tokenizer.all_special_ids)
            kept = [(ids, [i not in special for i in ids]) for ids in read]
            return list(from_token_ids(kept, self.batch_size))
        frozen = getattr(datamodule, "model", None)
        whole_rows = getattr(frozen, "isolation", None) == "none"
        blocks = self._blocks(datamodule)
        return list(from_blocks(blocks, self.rows, whole_rows=whole_rows, batch_size=self.batch_size))

    def _source(self, datamodule: Any) -> str | PreTrainedModel:
        source: str | PreTrainedModel | None = self.hf_model or getattr(datamodule, "hf_model", None)
        if source is None:
            raise ValueError('LossRecovered does not know which model to run; pass hf_model="..."')
        if isinstance(source, PreTrainedModel) and source.get_output_embeddings() is None:  # type: ignore[no-untyped-call]
            raise ValueError(
                f"{type(source).__name__} has no language model head, so there is no next-token loss; hand "
                "in the AutoModelForCausalLM, or its name, as hf_model="
            )
        return source

    def _blocks(self, datamodule: Any) -> Iterable[Blocks]:
        ask = getattr(datamodule, "heldout_blocks", None)
        blocks = None if ask is None or self.texts else ask(self.rows)
        if blocks is None and not self.texts:
            raise ValueError(
                "LossRecovered needs held-out text, and this data module has none (cached shards hold "
                "activations only); pass texts=[...]"
            )
        return () if blocks is None else cast("Iterable[Blocks]", blocks)


def whole_model(
    source: str | PreTrainedModel, model_kwargs: Mapping[str, Any] | None, device: torch.device
) -> PreTrainedModel:
    """The model with its head, in evaluation mode; one that was handed in is used as it is."""
    if isinstance(source, PreTrainedModel):
        return source
    name, kwargs = locate(source, model_kwargs)
    with torch.random.fork_rng(devices=[]):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, **kwargs)
    model.train(mode=False).requires_grad_(False)
    return model if "device_map" in kwargs else model.to(device)  # type: ignore[arg-type]
