"""Open the model and the text that activations are computed from while training.

In: `DataSettings`. Out: `LiveActivations` with streams, held-out rows, statistics and a fingerprint. Cheap checks come
first: names, configuration, dataset, tokenizer, then weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.model.hook_points import HookPoint, resolve
from deeplens_lightning.model.pretrained import (
    NoTokenizerError,
    load_config,
    load_tokenizer,
    locate,
    max_positions,
)
from deeplens_lightning.model.wrappers import unwrapped
from deeplens_lightning.stream import automatic_sizes as sizes
from deeplens_lightning.stream.live_activations import LiveActivations
from deeplens_lightning.stream.live_stream import GROUPED
from deeplens_lightning.stream.settings import DEFAULT_HOOK, DEFAULT_LAYER, DEMO_LM, DataSettings
from deeplens_lightning.text.packing import Packing
from deeplens_lightning.text.sources import Source, open_source
from deeplens_lightning.text.tokens import special_affixes
from deeplens_lightning.types import Placement


@dataclass(frozen=True)
class LiveSettings:
    """Resolve the model, hook points and text from the settings, before anything is loaded.

    Attributes:
        given: the settings of the data module, without `shards`.
    """

    given: DataSettings

    @property
    def hf_model(self) -> str | PreTrainedModel:
        """The language model, or its name."""
        given = DEMO_LM if self.given.hf_model is None else self.given.hf_model
        return given if isinstance(given, str) else unwrapped(given)

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's configuration; no weights are loaded."""
        if isinstance(self.hf_model, str):
            return load_config(self.hf_model, self.given.model_options.kwargs)
        return self.hf_model.config

    @cached_property
    def hook_points(self) -> tuple[HookPoint, ...]:
        """The hook points that `layer` and `hook` name, found without loading weights."""
        model = self.config if isinstance(self.hf_model, str) else self.hf_model
        layer = DEFAULT_LAYER if self.given.layer is None else self.given.layer
        return resolve(model, layer, self.given.hook or DEFAULT_HOOK)

    @property
    def widths(self) -> dict[str, int]:
        """Width of the rows, `d_in`, by canonical name of the hook point."""
        return {point.name: point.d_in for point in self.hook_points}

    def prepare(self) -> None:
        """Check the settings, and download a hub model to this node's cache."""
        self.check()
        kwargs = self.given.model_options.kwargs
        if isinstance(self.hf_model, str) and not Path(locate(self.hf_model, kwargs)[0]).exists():
            FrozenModel.load(self.hf_model, self.hook_points, device="cpu", model_kwargs=kwargs).close()

    def check(self) -> None:
        """Check the settings without loading weights or text.

        Raises:
            ValueError: an unknown hook point, a layer out of range, or a `seq_length` above the model's positions.
            FileNotFoundError: no such model.
        """
        limit, seq_length = max_positions(self.config), self.given.seq_length
        if limit is not None and seq_length > limit:
            raise ValueError(
                f"seq_length={seq_length} exceeds the model's {limit} positions: give {limit} or less"
            )
        _ = self.hook_points

    def open(self, placement: Placement) -> LiveActivations:
        """Load text, tokenizer and weights.

        Args:
            placement: rank and devices of this process.

        Raises:
            ValueError: the settings do not fit the model or the dataset.
            FileNotFoundError: the model or the dataset does not exist.
        """
        self.check()
        given, options = self.given, self.given.model_options
        source = open_source(
            given.dataset_name,
            text_column=given.text_column,
            split=given.dataset_split,
            dataset_kwargs=given.text_options.dataset_kwargs,
        )
        tokenizer = self._tokenizer(source)
        model = FrozenModel.load(
            self.hf_model,
            self.hook_points,
            device=placement.device,
            model_kwargs=options.kwargs,
            compile_model=options.compile,
            isolation=options.isolation,
            seq_length=given.seq_length,
        )
        size = sizes.model_batch_blocks(
            given.inference_batch_size, seq_length=given.seq_length, device=model.device
        )
        prefix, suffix = special_affixes(tokenizer, given.text_options.prepend_bos)
        special = tokenizer.all_special_ids if tokenizer and given.exclude_special_tokens else ()
        packing = Packing(
            seq_length=given.seq_length,
            blocks=GROUPED * size,
            prefix=prefix,
            suffix=suffix,
            excluded=tuple(sorted(special)),
            drop_first_n=given.text_options.drop_first_n,
            alone=model.isolation in ("padded", "equal"),
        )
        return LiveActivations(
            given=self.given,
            placement=placement,
            source=source,
            tokenizer=tokenizer,
            model=model,
            packing=packing,
            inference_batch_size=size,
        )

    def _tokenizer(self, source: Source) -> PreTrainedTokenizerBase | None:
        try:
            return load_tokenizer(
                self.hf_model, self.given.tokenizer, self.given.model_options.kwargs, self.config
            )
        except NoTokenizerError:
            first = next(iter(source.read(0, 0, seed=0, epoch=0)), None)
            if self.given.tokenizer is not None or first is None or isinstance(first.row, str):
                raise
            return None  # documents are token ids already
