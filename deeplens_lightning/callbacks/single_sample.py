"""`ExtractSingleSample`: the activations on each token of a text, and what an SAE makes of them.

Alone it reads a model's activations for a text. In a Trainer it does so every so many steps through
the data module's own frozen model, runs the SAE in training on them, and writes what it finds per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from deeplens_lightning.callbacks.sae_view import SaeView, choose_hook, find_sae
from deeplens_lightning.callbacks.single_sample_records import (
    TABLE_COLUMNS,
    Look,
    Sample,
    look_at,
    picture,
    records,
    table,
)
from deeplens_lightning.callbacks.support import Every, datamodule_of, hook_names, observing, remember
from deeplens_lightning.model.hook_points import HookPoint
from deeplens_lightning.model.single_text import TextActivations, read_batch
from deeplens_lightning.reporting.figures import save_pixels
from deeplens_lightning.reporting.loggers import log_image, log_scalars, log_table
from deeplens_lightning.reporting.readable_tokens import token_strings
from deeplens_lightning.reporting.run_folder import append_jsonl, run_folder

_PICTURE_LATENTS = 20


class ExtractSingleSample(Callback):
    """Activations of single texts, token by token: a utility, and a callback.

    As a utility (`get_mlp_acts`, `get_activations`) nothing is loaded before the first call.

    As a callback (`texts=` given) it writes into the run's folder, on rank 0 alone, every
    `every_n_steps` steps, at validation and at the end: `single_samples/samples.jsonl`, one line per
    token with `step, sample, position, token_id, token, norm, error, relative_error, l0, latents, values`
    (norms and errors are Euclidean, on raw activations; `relative_error` is error / norm), and pictures
    `single_samples/step_<step>_sample_<i>.png`. Loggers get the means as scalars `single_sample/<i>/...`,
    and tables and pictures where they show them.

    Args:
        hf_model: hub id, local folder, GGUF file, `demo:lm` or a loaded model. Default: `gpt2` alone,
            the data module's own model in a Trainer.
        layer: default 3 alone, the data module's in a Trainer.
        max_length: longer texts are cut to so many tokens; said once.
        device: `auto`, `cuda`, `mps` or `cpu`; of a model that this object loads.
        hook: kind, canonical name, TransformerLens name or module path; default `mlp_act` alone, the
            data module's in a Trainer (name one if it has several).
        texts: what to watch in a Trainer.
        every_n_steps: optimizer steps between two looks.
        image_every_n_steps: steps between two pictures, which cost far more than a look; default ten looks.
            Validation and the end always draw.
        n_latents: strongest latents kept per token.
        load_own: in a Trainer, load a model of its own where the data module has none (cached shards).
        tokenizer: default the model's own.
        model_kwargs: for `from_pretrained`.
        name: folder of the files, so that two of these callbacks can watch different things.
        sae: which one, of several that train side by side; default the first.
    """

    def __init__(
        self,
        hf_model: str | PreTrainedModel | None = None,
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
        self.hf_model = hf_model
        self.layer = layer
        self.max_length = max_length
        self.device = device
        self.hook = hook
        self.texts = tuple(texts)
        self.n_latents = n_latents
        self.load_own = load_own
        self.model_kwargs = model_kwargs
        self.name = name
        self.sae = sae
        self.written: list[Path] = []
        self._tokenizer_source = tokenizer
        self._every = Every(every_n_steps)
        self._every_image = Every(image_every_n_steps or 10 * every_n_steps, "image_every_n_steps")
        self._reader: TextActivations | None = None
        self._points: tuple[HookPoint, ...] = ()
        self._sae: SaeView | None = None
        self._samples: list[Sample] = []
        self._folder: Path | None = None
        self._recorded: tuple[int, bool] = (-1, False)

    # ---- as a utility

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer whose tokens line up with the rows."""
        return self._own_reader().tokenizer

    def get_mlp_acts(self, text: str, *, layer: int | None = None, hook: str | None = None) -> Tensor:
        """Activations of one text: `(seq_length, hidden_dim)` on the CPU, one row per token.

        Args:
            text: not empty; cut at `max_length` tokens.
            layer: default this object's.
            hook: default this object's, `mlp_act` unless another was named: the output of the MLP's
                activation function.

        Raises:
            ValueError: the text is empty, or the hook point does not exist (the message names near ones).
        """
        reader = self._own_reader()
        point = self._own_point(reader, layer, hook)
        return reader.rows(reader.token_ids(text), (point,))[point.name].cpu()

    def get_tokens(self, text: str) -> list[str]:
        """The text of each token that `get_mlp_acts` has a row for, special tokens included."""
        reader = self._own_reader()
        return token_strings(reader.tokenizer, reader.token_ids(text))

    def get_activations(self, text: str | Sequence[str], layer_idx: int = -1) -> dict[str, Any]:
        """The activations notebook's dictionary; see `ActivationExtractor.get_activations`."""
        return read_batch(self._own_reader(), text, layer_idx)

    # ---- as a callback

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the run's folder (every rank takes part)."""
        if stage == "fit":
            if not self.texts:
                raise ValueError('ExtractSingleSample in a Trainer needs texts, e.g. texts=["The cat sat."]')
            self._folder = run_folder(trainer) / self.name

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bind to the data module's model and tokenize the texts, before the first step."""
        self._bind(trainer, pl_module)
        assert self._reader is not None
        self._samples = []
        for text in self.texts:
            ids = self._reader.token_ids(text)
            self._samples.append(
                Sample(text=text, ids=ids, tokens=token_strings(self._reader.tokenizer, ids))
            )
        if self._sae is None:
            rank_zero_info(
                f"{type(pl_module).__name__} has no encode and decode: single samples show norms only"
            )

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look every so many steps."""
        step = trainer.global_step
        look, draw = self._every.due(step), self._every_image.due(step)
        if look or draw:
            self._record(trainer, pl_module, draw)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look and draw after validation; not in the sanity check."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._record(trainer, pl_module, draw=True)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look and draw at the end."""
        self._record(trainer, pl_module, draw=True)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the data module's model."""
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the data module's model; Lightning calls no teardown then."""
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
        """What was asked for, else what this object was made for, else DeepLens's defaults."""
        layer = self.layer if layer is None else layer
        return 3 if layer is None else layer, hook or self.hook or "mlp_act"

    def _bind(self, trainer: Trainer, module: LightningModule) -> None:
        datamodule = datamodule_of(trainer)
        frozen = getattr(datamodule, "model", None)
        source = getattr(datamodule, "hf_model", None)
        if self.hf_model is not None or (frozen is None and self.load_own):
            source = self.hf_model if self.hf_model is not None else source
            frozen = None
        elif frozen is None:
            raise ValueError(
                "ExtractSingleSample has no model to read: the data module serves cached shards (or is not "
                'ours). Name one, hf_model="...", or pass load_own=True to load the one the shards came from'
            )
        if source is None:
            raise ValueError(
                'the data module does not say which model its rows came from; pass hf_model="..."'
            )
        self._release()
        self._reader = TextActivations(
            source,
            max_length=self.max_length,
            device=self.device,
            tokenizer=self._tokenizer_source or getattr(datamodule, "tokenizer", None),
            model_kwargs=self.model_kwargs or getattr(datamodule, "model_kwargs", None),
            frozen=frozen,
            prepend_bos=getattr(getattr(datamodule, "source", None), "prepend_bos", None),
        )
        self._points = self._bound_points(trainer, module)

    def _bound_points(self, trainer: Trainer, module: LightningModule) -> tuple[HookPoint, ...]:
        assert self._reader is not None
        names = hook_names(trainer)
        named = self._named_hook(names)
        self._sae = find_sae(module, names, named, self.sae)
        wanted = (choose_hook(names, named),) if self._sae is None else self._sae.hooks
        if named is not None and named not in wanted:
            raise ValueError(
                f"the SAE in training reads {', '.join(wanted)}, not {named}; leave layer and hook out"
            )
        if "" in wanted:
            raise ValueError(
                "the data module does not say which hook point its rows come from; name it as hook="
            )
        return tuple(self._reader.point(None, name) for name in wanted)

    def _named_hook(self, names: Sequence[str]) -> str | None:
        assert self._reader is not None
        if self.layer is None and self.hook is None:
            return None
        kinds = {name.rpartition(".")[2] for name in names} or {"mlp_act"}
        if self.hook is None and len(kinds) > 1:
            raise ValueError(f"layer={self.layer} names several of {', '.join(names)}; name one as hook=")
        return self._reader.point(self.layer, self.hook or kinds.pop()).name

    def _release(self) -> None:
        if self._reader is not None:
            self._reader.close()  # asked again later, it loads the same model by itself

    def _record(self, trainer: Trainer, module: LightningModule, draw: bool) -> None:
        step = trainer.global_step
        if not trainer.is_global_zero or self._recorded in {(step, True), (step, draw)}:
            return
        written = self._recorded[0] == step
        self._recorded = (step, draw)
        assert self._folder is not None
        for index, sample in enumerate(self._samples):
            look = self._look(module, sample, _PICTURE_LATENTS if draw else 0)
            if not written:
                self._write(trainer, index, sample, look, step)
            if draw:
                pixels = picture(sample, look, f"step {step}: {sample.text}")
                save_pixels(pixels, self._folder / f"step_{step:08d}_sample_{index}.png")
                log_image(trainer.loggers, f"single_sample/{index}/heatmap", pixels, step)
        remember(self.written, self._folder)

    def _look(self, module: LightningModule, sample: Sample, n_columns: int) -> Look:
        assert self._reader is not None
        with observing(module):
            rows = self._reader.rows(sample.ids, self._points)
            rows = {name: x.to(module.device) for name, x in rows.items()}
            return look_at(rows, self._sae, self.n_latents, n_columns)

    def _write(self, trainer: Trainer, index: int, sample: Sample, look: Look, step: int) -> None:
        assert self._folder is not None
        lines = records(sample, look, step, index)
        append_jsonl(self._folder / "samples.jsonl", lines)
        prefix = f"single_sample/{index}"
        log_scalars(trainer.loggers, {f"{prefix}/{name}": mean for name, mean in look.means().items()}, step)
        log_table(trainer.loggers, f"{prefix}/tokens", TABLE_COLUMNS, table(lines), step)
