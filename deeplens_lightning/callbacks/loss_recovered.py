"""`LossRecovered`: measure how much of the language model's loss remains with the SAE's reconstruction.

The model runs on held-out text four times: untouched, with the reconstruction in place of the activations, with zeros
in their place, and with their mean. CE recovered is `(ce_zero - ce_sae) / (ce_zero - ce_clean)`, the "loss recovered"
of Bricken et al. 2023.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from typing_extensions import override

from deeplens_lightning.activation_data import ActivationData, activation_data
from deeplens_lightning.callbacks.sae_view import SaeView, require_sae
from deeplens_lightning.callbacks.segments import Segments, from_blocks, from_token_ids
from deeplens_lightning.callbacks.spliced_loss import AblatedLoss, measure
from deeplens_lightning.callbacks.support import (
    SaeObserver,
    add_written,
    check_widths,
    evaluation_mode,
    exclusive_model,
    from_rank_zero,
)
from deeplens_lightning.devices import check_device, device_of
from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.model.hook_points import HookPoint, resolve
from deeplens_lightning.model.pretrained import load_config, locate
from deeplens_lightning.model.single_text import TextActivations
from deeplens_lightning.model.wrappers import unwrapped
from deeplens_lightning.reporting.loggers import log_scalars
from deeplens_lightning.reporting.run_folder import append_jsonl
from deeplens_lightning.text.packing import Blocks


class LossRecovered(SaeObserver):
    """Measures next-token loss with the reconstruction in place, at validation and at the end of a fit without it.

    Only the positions that the SAE trains on are replaced. Of these, a position is scored if its next token belongs to
    the same segment. Logged, in nats per scored token: `val/ce_clean`, `val/ce_sae`, `val/ce_zero`, `val/ce_mean`, and
    the KL divergences from the clean prediction `val/kl` (to the one with the reconstruction) and `val/kl_zero` (to the
    one with zeros). `docs/pages/metrics.md` has the formulas. Also logged: `val/ce_recovered`, 1 for a
    perfect reconstruction and 0 for zeros, and `val/ce_recovered_mean`, the same against the mean. Written in the
    run's folder: `loss_recovered.jsonl`. With `sae`, names of metrics end with `/<sae>`, and the file is
    `loss_recovered-<sae>.jsonl`.

    Rank 0 loads the whole model, head included, at the first measurement, measures alone, and sends the values to the
    other ranks.

    Args:
        rows: held-out rows to measure on, at least 1; the last segment is taken whole. Use thousands: with a few
            hundred, texts differ from each other by more than ablation costs.
        batch_size: segments in a model batch, at least 1.
        texts: texts to measure on instead of the data module's held-out text; needed with cached shards, which hold no
            text.
        hf_model: hub id, folder, GGUF file, `demo:lm` or a loaded model, which may be wrapped by `torch.compile` or PEFT;
            default the data module's.
        device: device of the whole model: `cpu`, `cuda`, `cuda:1`, `mps`, or `auto` for the device of the data module's
            model where it has one, else the SAE's.
        model_kwargs: arguments for `from_pretrained`; default the data module's.
        sae: name of one SAE of a module that trains several, such as `k=32`; default the first.

    Raises:
        ValueError: `rows` or `batch_size` is below 1. At the start of a fit: there is no model, no held-out text, no
            language model head, no hook point, or the model has rows of another width.
        TypeError: `texts` is one string. At the start of a fit: the module has no `encode` or no `decode`.
    """

    def __init__(
        self,
        rows: int = 8192,
        batch_size: int = 8,
        *,
        texts: Sequence[str] = (),
        hf_model: str | nn.Module | None = None,
        device: str = "auto",
        model_kwargs: dict[str, Any] | None = None,
        sae: str | None = None,
    ) -> None:
        if rows < 1 or batch_size < 1:
            raise ValueError(f"rows={rows} and batch_size={batch_size} must be at least 1")
        if isinstance(texts, str):
            raise TypeError(f"texts must be a list of texts, got one string: write texts=[{texts[:20]!r}]")
        super().__init__("loss_recovered", sae)
        check_device(device)
        self.rows = rows
        self.batch_size = batch_size
        self.texts = tuple(texts)
        self.hf_model = hf_model
        self.device = device
        self.model_kwargs = model_kwargs
        self._path: Path | None = None
        self._model: PreTrainedModel | None = None
        self._batches: list[Segments] = []
        self._ablated: AblatedLoss | None = None
        self._measured = -1

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        place = self.find_place(trainer)
        self._path = place.with_name(f"{place.name}.jsonl")
        self._measured = -1

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check before the first step that there is an SAE, a model and text; nothing is loaded yet."""
        data = activation_data(trainer)
        view = require_sae(pl_module, data.hook_names, "LossRecovered", self.sae)
        source = self._source(data)
        self._blocks(data)
        if data.model is None or self.hf_model is not None:  # rows that another model may have computed
            self._check_model(data, source, view)

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
        self._model, self._batches, self._ablated = None, [], None

    def _shared(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        """Measure on rank 0 and return the values on every rank: a checkpoint callback may monitor them."""
        self._measured = trainer.global_step
        return from_rank_zero(trainer, lambda: self._measure(trainer, module))

    def _measure(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        data = activation_data(trainer)
        with evaluation_mode(module), exclusive_model(data):
            sae = require_sae(module, data.hook_names, "LossRecovered", self.sae)
            model, points = self._prepare(data, module, sae)
            with evaluation_mode(model):
                loss = measure(model, sae, points, self._batches, self._ablated, module.device)
        self._ablated = AblatedLoss(ce_zero=loss.ce_zero, ce_mean=loss.ce_mean, kl_zero=loss.kl_zero)
        values: dict[str, float] = asdict(loss)
        assert self._path is not None
        append_jsonl(self._path, [{"step": trainer.global_step} | values])
        add_written(self.written, self._path)
        return {self.metric(f"val/{name}"): value for name, value in values.items() if name != "tokens"}

    def _prepare(
        self, data: ActivationData, module: LightningModule, sae: SaeView
    ) -> tuple[PreTrainedModel, tuple[HookPoint, ...]]:
        """Load the model and the segments at the first call; return the model and the SAE's hook points in it."""
        if self._model is None:
            source = self._source(data)
            kwargs = self.model_kwargs or data.model_kwargs
            frozen: FrozenModel | None = data.model
            device = frozen.device if frozen is not None and self.device == "auto" else module.device
            self._model = whole_model(
                source, kwargs, device if self.device == "auto" else device_of(self.device)
            )
            self._batches = self._segments(data, source, kwargs)
        if not any(bool(batch.scored.any()) for batch in self._batches):
            raise ValueError(
                "LossRecovered found no held-out token to score; raise rows or val_fraction, or pass "
                "texts=[...]"
            )
        return self._model, resolve(self._model, None, sae.hooks)

    def _segments(
        self, data: ActivationData, source: str | PreTrainedModel, kwargs: Mapping[str, Any] | None
    ) -> list[Segments]:
        if self.texts:
            reader = TextActivations(source, tokenizer=data.tokenizer, model_kwargs=kwargs)
            read = [reader.token_ids(text) for text in self.texts]
            special = set(reader.tokenizer.all_special_ids)
            kept = [(ids, [i not in special for i in ids]) for ids in read]
            return list(from_token_ids(kept, self.batch_size))
        frozen: FrozenModel | None = data.model
        whole_rows = frozen is not None and frozen.isolation == "none"
        blocks = self._blocks(data)
        return list(from_blocks(blocks, self.rows, whole_rows=whole_rows, batch_size=self.batch_size))

    def _source(self, data: ActivationData) -> str | PreTrainedModel:
        given = data.hf_model if self.hf_model is None else self.hf_model
        if given is None:
            raise ValueError(
                'LossRecovered has no model to run: the data module names none; pass hf_model="..."'
            )
        source: str | PreTrainedModel = given if isinstance(given, str) else unwrapped(given)
        if isinstance(source, PreTrainedModel) and source.get_output_embeddings() is None:  # type: ignore[no-untyped-call]
            raise ValueError(
                f"{type(source).__name__} has no language model head, so there is no next-token loss; pass "
                "the AutoModelForCausalLM, or its name, as hf_model="
            )
        return source

    def _check_model(self, data: ActivationData, source: str | PreTrainedModel, sae: SaeView) -> None:
        if "" in sae.hooks:
            raise ValueError(
                "LossRecovered needs the hook point of the rows, and the data module does not say it: with bare tensors "
                "as shards, give layer= and hook= too"
            )
        model = (
            load_config(source, self.model_kwargs or data.model_kwargs) if isinstance(source, str) else source
        )
        check_widths(resolve(model, None, sae.hooks), data, "LossRecovered")

    def _blocks(self, data: ActivationData) -> Iterable[Blocks]:
        if self.texts:
            return ()
        blocks = data.heldout_blocks(self.rows)
        if blocks is None:
            raise ValueError(
                "LossRecovered needs held-out text, and this data module has none (cached shards hold "
                "activations only); pass texts=[...]"
            )
        return blocks


def whole_model(
    source: str | PreTrainedModel, model_kwargs: Mapping[str, Any] | None, device: torch.device
) -> PreTrainedModel:
    """Load a language model with its head, in evaluation mode, without drawing from the global random generator.

    Args:
        source: name of the model, or a loaded model, which is returned unchanged.
        model_kwargs: arguments for `from_pretrained`.
        device: where the model goes; with a `device_map` in `model_kwargs` it stays where that puts it.
    """
    if isinstance(source, PreTrainedModel):
        return source
    name, kwargs = locate(source, model_kwargs)
    with torch.random.fork_rng(devices=[]):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, **kwargs)
    model.train(mode=False).requires_grad_(False)
    return model if "device_map" in kwargs else model.to(device)  # type: ignore[arg-type]
