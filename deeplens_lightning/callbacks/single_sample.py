"""`ExtractSingleSample`: activations on each token of a text, and the SAE's latents and error on them.

Without a Trainer it returns a model's activations for a text. As a callback it reads its texts at fixed intervals
through the data module's own frozen model, runs the SAE in training on them, and writes numbers for each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from deeplens_lightning.activation_data import activation_data, callbacks_of
from deeplens_lightning.callbacks.context_search import NoContextsError, heldout_rows, search
from deeplens_lightning.callbacks.sae_view import SaeView, find_sae
from deeplens_lightning.callbacks.single_sample_reader import named_hook, points_to_read, reader_for
from deeplens_lightning.callbacks.single_sample_records import (
    TABLE_COLUMNS,
    Sample,
    SampleRecord,
    record_sample,
    sample_picture,
    table_rows,
    token_records,
)
from deeplens_lightning.callbacks.support import (
    Every,
    SaeObserver,
    add_written,
    check_widths,
    evaluation_mode,
    exclusive_model,
)
from deeplens_lightning.devices import check_device
from deeplens_lightning.model.hook_points import HookPoint
from deeplens_lightning.model.single_text import TextActivations, read_batch
from deeplens_lightning.reporting.figures import save_pixels
from deeplens_lightning.reporting.loggers import log_image, log_scalars, log_table
from deeplens_lightning.reporting.readable_tokens import token_strings
from deeplens_lightning.reporting.run_folder import append_jsonl, write_json

_PICTURE_LATENTS = 20


class ExtractSingleSample(SaeObserver):
    """Activations of single texts, token by token; also a callback that records them during training.

    Without a Trainer, use `get_mlp_acts`, `get_tokens` and `get_activations`; the model is loaded at the first call.

    As a callback (with `texts=`) it records every `every_n_steps` optimizer steps, after each validation and at the
    end, and writes on rank 0 in the run's folder:

    - `single_samples/samples.jsonl`: one line for each token with `step, sample, position, token_id, token, norm,
      error, relative_error, l0, latents, values`, and in a grid `sae`. Norms and errors are Euclidean, on raw rows;
      `relative_error` is error / norm.
    - `single_samples/step_<step>_sample_<i>.png`: pictures;
    - `single_samples/latents.json`: at the end, held-out text where the latents of the last record are active.

    Loggers get the means over tokens as scalars `single_sample/<i>/...`; those that show tables and pictures get these
    too. Texts of a second such callback are counted on. With `sae`, names of metrics end with `/<sae>`, and the folder
    is `single_samples-<sae>`.

    Args:
        hf_model: hub id, local folder, GGUF file, `demo:lm` or a loaded model, which may be wrapped by
            `torch.compile` or PEFT. Default: `gpt2` without a Trainer, the
            data module's own model in a Trainer.
        layer: layer of the hook point. Default: 3 without a Trainer, the data module's in a Trainer.
        max_length: longer texts are cut to this number of tokens; the first cut gives a warning.
        device: device of a model that this object loads: `cpu`, `cuda`, `cuda:1`, `mps`, or `auto` for the first of
            CUDA, MPS and the CPU that is there.
        hook: a kind (`mlp_in`, `mlp_act`, `mlp_post`, `mlp_out`, `attn_out`, `attn_z`, `resid_pre`, `resid_mid`,
            `resid_post`, `final_norm`), a canonical name (`layers.3.mlp_out`), a TransformerLens name
            (`blocks.3.hook_mlp_out`) or a module path (`transformer.h.3.mlp`). Default: `mlp_act` without a Trainer, the
            data module's in a Trainer (required if it has several).
        texts: texts to record in a Trainer.
        every_n_steps: optimizer steps between two records.
        image_every_n_steps: optimizer steps between two pictures, which take much longer than a record; default ten
            times `every_n_steps`. A picture is also drawn after each validation and at the end.
        n_latents: number of latents to record for each token, those with the largest activations.
        load_own: in a Trainer whose data module has no model (cached shards), load the model that its rows came from.
        tokenizer: hub id, folder or a loaded tokenizer; default the model's own.
        model_kwargs: arguments for `from_pretrained`.
        name: name of the folder for the files; two of these callbacks for one SAE need different names.
        sae: name of one SAE of a module that trains several, such as `k=32`; default the first.

    Raises:
        TypeError: `texts` is one string.
        ValueError: a number below 1. At the start of a fit: no texts, no model to read, or a hook point that the SAE
            does not read.
    """

    def __init__(
        self,
        hf_model: str | nn.Module | None = None,
        layer: int | None = None,
        max_length: int = 1024,
        device: str = "auto",
        *,
        hook: str | None = None,
        texts: Sequence[str] = (),
        every_n_steps: int = 100,
        image_every_n_steps: int | None = None,
        n_latents: int = 8,
        load_own: bool = False,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        model_kwargs: dict[str, Any] | None = None,
        name: str = "single_samples",
        sae: str | None = None,
    ) -> None:
        if isinstance(texts, str):
            raise TypeError(f"texts must be a list of texts, got one string: write texts=[{texts[:20]!r}]")
        if max_length < 1:
            raise ValueError(f"max_length={max_length} keeps no token; it must be at least 1")
        if n_latents < 1:
            raise ValueError(f"n_latents={n_latents} must be at least 1")
        super().__init__(name, sae)
        check_device(device)
        self.hf_model = hf_model
        self.layer = layer
        self.max_length = max_length
        self.device = device
        self.hook = hook
        self.texts = tuple(texts)
        self.n_latents = n_latents
        self.load_own = load_own
        self.model_kwargs = model_kwargs
        self._tokenizer_source = tokenizer
        self._every = Every(every_n_steps)
        self._every_image = Every(image_every_n_steps or 10 * every_n_steps, "image_every_n_steps")
        self._reader: TextActivations | None = None
        self._points: tuple[HookPoint, ...] = ()
        self._sae: SaeView | None = None
        self._samples: list[Sample] = []
        self._folder: Path | None = None
        self._first = 0  # number of the first text in the names of metrics
        self._shown: set[int] = set()  # latents in the last record
        self._recorded: tuple[int, bool] = (-1, False)  # step of the last record, and whether it was drawn

    # ---- without a Trainer

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the model; its tokens are the rows of `get_mlp_acts`."""
        return self._own_reader().tokenizer

    def get_mlp_acts(self, text: str, *, layer: int | None = None, hook: str | None = None) -> Tensor:
        """Activations of one text: `(seq_length, hidden_dim)` on the CPU, one row for each token.

        Args:
            text: a text that is not empty; it is cut at `max_length` tokens.
            layer: default the layer given to this object.
            hook: default the hook given to this object, or `mlp_act`, the output of the MLP's activation function.

        Raises:
            ValueError: the text is empty, or the hook point does not exist (the message lists similar names).
        """
        reader = self._own_reader()
        point = self._own_point(reader, layer, hook)
        return reader.rows(reader.token_ids(text), (point,))[point.name].cpu()

    def get_tokens(self, text: str) -> list[str]:
        """Text of each token, special tokens included: one string for each row of `get_mlp_acts`."""
        reader = self._own_reader()
        return token_strings(reader.tokenizer, reader.token_ids(text))

    def get_activations(self, text: str | Sequence[str], layer_idx: int = -1) -> dict[str, Any]:
        """Activations, tokens, ids and mask of one or several texts, as `ActivationExtractor.get_activations`.

        Args:
            text: one text, or a list of texts, which are padded on the right.
            layer_idx: number of the block whose output is read; -1 is the final norm, -2 the last block but one.

        Returns:
            `activations` `(batch, seq_length, d_in)`, `tokens`, `input_ids`, `attention_mask` and `layer_idx`.
        """
        return read_batch(self._own_reader(), text, layer_idx)

    # ---- as a callback

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the run's folder; a collective, so every rank calls it."""
        if stage == "fit":
            if not self.texts:
                raise ValueError('ExtractSingleSample in a Trainer needs texts, e.g. texts=["The cat sat."]')
            self._folder = self.find_place(trainer)
            callbacks = callbacks_of(trainer)
            before = callbacks[: callbacks.index(self)] if self in callbacks else []
            same = [c for c in before if isinstance(c, ExtractSingleSample) and c.sae == self.sae]
            self._first = sum(len(c.texts) for c in same)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose model, hook points and SAE, and tokenize the texts, before the first step."""
        reader = self._bind(trainer, pl_module)
        self._samples = []
        for text in self.texts:
            ids = reader.token_ids(text)
            self._samples.append(Sample(text=text, ids=ids, tokens=token_strings(reader.tokenizer, ids)))
        if self._sae is None:
            rank_zero_info(
                f"{type(pl_module).__name__} has no encode and decode: single samples show norms only"
            )

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record every `every_n_steps` steps, and draw every `image_every_n_steps` steps."""
        step = trainer.global_step
        record, draw = self._every.due(step), self._every_image.due(step)
        if record or draw:
            self._record(trainer, pl_module, draw)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record and draw after validation, but not after the sanity check."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._record(trainer, pl_module, draw=True)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record and draw at the end, and find contexts of the latents in this record."""
        self._record(trainer, pl_module, draw=True)
        if trainer.is_global_zero and self._sae is not None and self._shown:
            self._write_contexts(trainer, pl_module, self._sae)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Free the model, or the reference to the data module's model."""
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Free the model, or the reference to the data module's: Lightning calls no `teardown` after an exception."""
        self._release()

    # ---- inside

    def _own_reader(self) -> TextActivations:
        if self._reader is None:
            self._reader = TextActivations(
                self.hf_model if self.hf_model is not None else "gpt2",
                max_length=self.max_length,
                device=self.device,
                tokenizer=self._tokenizer_source,
                model_kwargs=self.model_kwargs,
            )
        return self._reader

    def _own_point(self, reader: TextActivations, layer: int | None, hook: str | None) -> HookPoint:
        if layer is None and hook is None and self._points:
            return self._points[0]
        return reader.point(*self._named(layer, hook))

    def _named(self, layer: int | None, hook: str | None) -> tuple[int, str]:
        """Layer and hook of a call, else those given to this object, else DeepLens's defaults."""
        layer = self.layer if layer is None else layer
        return 3 if layer is None else layer, hook or self.hook or "mlp_act"

    def _bind(self, trainer: Trainer, module: LightningModule) -> TextActivations:
        data = activation_data(trainer)
        reader = reader_for(
            data,
            hf_model=self.hf_model,
            load_own=self.load_own,
            max_length=self.max_length,
            device=self.device,
            tokenizer=self._tokenizer_source,
            model_kwargs=self.model_kwargs,
        )
        self._release()
        self._reader = reader
        named = named_hook(reader, data.hook_names, self.layer, self.hook)
        self._sae = find_sae(module, data.hook_names, named, self.sae)
        self._points = points_to_read(reader, data.hook_names, named, self._sae)
        check_widths(self._points, data, "ExtractSingleSample")
        return reader

    def _release(self) -> None:
        if self._reader is not None:
            self._reader.close()  # a later `get_mlp_acts` loads the same model again

    def _record(self, trainer: Trainer, module: LightningModule, draw: bool) -> None:
        step = trainer.global_step
        if not trainer.is_global_zero or self._recorded in {(step, True), (step, draw)}:
            return
        written = self._recorded[0] == step
        self._recorded, self._shown = (step, draw), set()
        assert self._folder is not None
        for index, sample in enumerate(self._samples):
            record = self._measure(trainer, module, sample, _PICTURE_LATENTS if draw else 0)
            self._shown |= set(record.latents[record.values > 0].tolist())
            if not written:
                self._write(trainer, self._folder, index, sample, record)
            if draw:
                pixels = sample_picture(sample, record, f"step {step}: {sample.text}")
                save_pixels(pixels, self._folder / f"step_{step:08d}_sample_{index}.png")
                log_image(trainer.loggers, self._metric(index, "heatmap"), pixels, step)
        add_written(self.written, self._folder)

    def _measure(
        self, trainer: Trainer, module: LightningModule, sample: Sample, n_columns: int
    ) -> SampleRecord:
        assert self._reader is not None
        with evaluation_mode(module):
            with exclusive_model(activation_data(trainer)):
                rows = self._reader.rows(sample.ids, self._points)
            rows = {name: x.to(module.device) for name, x in rows.items()}
            return record_sample(rows, self._sae, self.n_latents, n_columns)

    def _write(
        self, trainer: Trainer, folder: Path, index: int, sample: Sample, record: SampleRecord
    ) -> None:
        step = trainer.global_step
        lines = token_records(sample, record, step, index)
        if self._sae is not None and self._sae.name:
            lines = [line | {"sae": self._sae.name} for line in lines]
        append_jsonl(folder / "samples.jsonl", lines)
        means = {self._metric(index, name): mean for name, mean in record.means().items()}
        log_scalars(trainer.loggers, means, step)
        log_table(trainer.loggers, self._metric(index, "tokens"), TABLE_COLUMNS, table_rows(lines), step)

    def _metric(self, index: int, name: str) -> str:
        return self.metric(f"single_sample/{self._first + index}/{name}")

    def _write_contexts(self, trainer: Trainer, module: LightningModule, sae: SaeView) -> None:
        assert self._folder is not None
        assert self._reader is not None
        try:
            with evaluation_mode(module):
                found = search(
                    sae,
                    heldout_rows(trainer, sae.reads),
                    sorted(self._shown),
                    keep=8,
                    before=24,
                    after=8,
                    tokenizer=self._reader.tokenizer,
                )
        except NoContextsError as error:
            rank_zero_info(f"ExtractSingleSample has no contexts of its latents: {error}")
            return
        write_json(self._folder / "latents.json", found.as_json(trainer.global_step))
