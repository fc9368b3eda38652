"""Read the activations of single texts, one row per token, without packing or shuffling.

In: a text. Out: activations `(seq_length, d_in)` by hook point. `TextActivations` loads a model of its own when it
first needs one, or reads through a `FrozenModel` that is already loaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from deeplens_lightning.devices import device_of
from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.model.hf_config import setting
from deeplens_lightning.model.hook_points import HookPoint, resolve
from deeplens_lightning.model.pretrained import load_config, load_tokenizer, max_positions
from deeplens_lightning.model.tracing import trace
from deeplens_lightning.model.wrappers import unwrapped
from deeplens_lightning.text.tokens import special_affixes


class TextActivations:
    """Reads hook points of one model on single texts.

    Args:
        hf_model: hub id, local folder, GGUF file, `demo:lm` or a loaded model. A model given by name is loaded when it
            is first needed.
        max_length: longer texts are cut to this number of tokens, or to the model's positions if those are fewer;
            the first cut gives a warning.
        device: where a model that is loaded here goes; `auto` is CUDA, else MPS, else the CPU.
        tokenizer: a tokenizer, or its hub id or folder; None for the model's own.
        model_kwargs: keyword arguments for `from_pretrained`.
        frozen: a loaded model to read through. Only its own hook points can be read, and `close` leaves it open.
        prepend_bos: None for the special tokens that the tokenizer itself puts around a text, True for a BOS in front
            in any case, False for no special tokens.

    Raises:
        ValueError: `max_length` is below 1.
    """

    def __init__(
        self,
        hf_model: str | nn.Module,
        *,
        max_length: int = 1024,
        device: str | torch.device = "auto",
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        frozen: FrozenModel | None = None,
        prepend_bos: bool | None = None,
    ) -> None:
        if max_length < 1:
            raise ValueError(f"max_length={max_length} keeps no token; give at least 1")
        self.hf_model = hf_model if isinstance(hf_model, str) else unwrapped(hf_model)
        self.max_length = max_length
        self.device = device
        self.model_kwargs = model_kwargs
        self.prepend_bos = prepend_bos
        self._tokenizer_source = tokenizer
        self._frozen = frozen  # None while no model is loaded
        self._borrowed = frozen is not None
        self._warned_of_cut = False
        if frozen is not None:
            self.config = frozen.config

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the texts."""
        return load_tokenizer(self.hf_model, self._tokenizer_source, self.model_kwargs)

    @cached_property
    def config(self) -> PretrainedConfig:
        """The configuration of the model; reading it loads no weights."""
        model = self.hf_model
        return model.config if isinstance(model, PreTrainedModel) else load_config(model, self.model_kwargs)

    def point(self, layer: int | None, hook: str) -> HookPoint:
        """The single hook point that `layer` and `hook` name, as in `resolve`.

        Raises:
            ValueError: it does not exist, or several were named.
        """
        points = resolve(self._structure, layer, hook)
        if len(points) != 1:
            names = ", ".join(point.name for point in points)
            raise ValueError(f"a single sample reads one hook point, but {names} were named; choose one")
        return points[0]

    @property
    def depth(self) -> int:
        """Number of layers of the model; no weights are loaded."""
        return trace(self._structure).depth

    def token_ids(self, text: str) -> list[int]:
        """Token ids of a text with its special tokens, cut to the allowed length.

        Raises:
            TypeError: `text` is not a string.
            ValueError: the text has no tokens, or a token that is not in the model's vocabulary.
        """
        if not isinstance(text, str):
            raise TypeError(
                f"text must be a string, got {type(text).__name__}; give several texts one by one"
            )
        own = self.prepend_bos is None
        ids: list[int] = self.tokenizer(text, add_special_tokens=own, truncation=False, verbose=False)[
            "input_ids"
        ]
        if not text.strip() or not ids:
            raise ValueError(f"text={text!r} is empty: there is no token to read activations of")
        prefix, suffix = ((), ()) if own else special_affixes(self.tokenizer, self.prepend_bos)
        ids = [*prefix, *ids, *suffix]
        limit = self._limit()
        if len(ids) > limit:
            self._warn_of_cut(len(ids), limit)
            ids = ids[:limit]
        self._check_vocabulary(ids)
        return ids

    def rows(self, ids: Sequence[int], points: Sequence[HookPoint]) -> dict[str, Tensor]:
        """Activations of one text, `(seq_length, d_in)` by canonical hook point name, on the model's device.

        Args:
            ids: token ids, from `token_ids`.
            points: the hook points to read.

        Raises:
            ValueError: the given `frozen` model does not read one of the hook points.
        """
        batch = self.padded(torch.tensor([list(ids)]), None, points)
        return {name: x[0] for name, x in batch.items()}

    def padded(
        self, input_ids: Tensor, attention_mask: Tensor | None, points: Sequence[HookPoint]
    ) -> dict[str, Tensor]:
        """Activations of several texts that are padded on the right, on the model's device.

        Args:
            input_ids: int64 `(batch, seq_length)`.
            attention_mask: int64 `(batch, seq_length)`, 0 at pads; None if there are no pads.
            points: the hook points to read.

        Returns:
            `(batch, seq_length, d_in)` by canonical hook point name.

        Raises:
            ValueError: the given `frozen` model does not read one of the hook points.
        """
        read = self._model_for(points).activations(input_ids, None, attention_mask)
        return {point.name: read[point.name] for point in points}

    def close(self) -> None:
        """Free the model that was loaded here; a given `frozen` model stays open. The next read loads one again."""
        if self._frozen is not None and not self._borrowed:
            self._frozen.close()
        self._frozen, self._borrowed = None, False

    @property
    def _structure(self) -> PretrainedConfig | PreTrainedModel:
        return self.hf_model if isinstance(self.hf_model, PreTrainedModel) else self.config

    def _model_for(self, points: Sequence[HookPoint]) -> FrozenModel:
        """A loaded model that reads these hook points."""
        present = {} if self._frozen is None else {point.name: point for point in self._frozen.hook_points}
        missing = [point for point in points if point.name not in present]
        if self._frozen is not None and not missing:
            return self._frozen
        if self._borrowed:
            raise ValueError(
                f"the data module's model reads {', '.join(present)}, not {missing[0].name}; leave layer and "
                'hook out, or give hf_model="..." to load a model for this callback'
            )
        # The model is loaded again, up to the deepest hook point, with those that were read before: there is one
        # model at a time, and reading them by turns does not load it each time.
        self.close()
        self._frozen = FrozenModel.load(
            self.hf_model,
            (*present.values(), *missing),
            device=device_of(self.device),
            model_kwargs=self.model_kwargs,
            isolation="padded",
        )
        return self._frozen

    def _limit(self) -> int:
        positions = max_positions(self.config)
        return self.max_length if positions is None else min(self.max_length, positions)

    def _warn_of_cut(self, length: int, limit: int) -> None:
        if not self._warned_of_cut:
            self._warned_of_cut = True
            reason = "max_length" if limit == self.max_length else "the model's positions"
            warnings.warn(
                f"a text of {length} tokens was cut to {limit} ({reason}); later cuts give no warning",
                stacklevel=4,
            )

    def _check_vocabulary(self, ids: Sequence[int]) -> None:
        size = setting(self.config, "vocab_size")
        worst = max(ids)
        if isinstance(size, int) and worst >= size:
            token = self.tokenizer.convert_ids_to_tokens([worst])[0]
            raise ValueError(
                f"token id {worst} ({token!r}) is outside the model's vocabulary of {size}: this tokenizer "
                "belongs to another model; give the right one as tokenizer="
            )


def read_batch(reader: TextActivations, text: str | Sequence[str], layer_idx: int) -> dict[str, Any]:
    """Activations of one or several texts, as the dictionary of DeepLens's activations notebook.

    Args:
        reader: the model and tokenizer.
        text: one text, or a list of texts, which are padded on the right.
        layer_idx: the layer whose output is read. -1 is the final norm; other negative numbers count from the end,
            so -2 is the last layer but one.

    Returns:
        A dictionary with these keys; all tensors are on the CPU:

        - `activations`: `(batch, seq_length, hidden)`;
        - `tokens`: vocabulary entries of the text, or a list of them for each text of a list;
        - `input_ids` and `attention_mask`: int64 `(batch, seq_length)`;
        - `layer_idx`: as given.

    Raises:
        ValueError: there is no text, a text is empty, or the layer is out of range.
    """
    texts = [text] if isinstance(text, str) else list(text)
    if not texts:
        raise ValueError("an empty list of texts has no activations; give at least one text")
    point = _output_of(reader, layer_idx)
    ids = [reader.token_ids(item) for item in texts]
    length = max(map(len, ids))
    pad = reader.tokenizer.pad_token_id
    filler = pad if isinstance(pad, int) else 0
    input_ids = torch.tensor([row + [filler] * (length - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids])
    activations = reader.padded(input_ids, None if bool(mask.all()) else mask, (point,))[point.name]
    tokens = [reader.tokenizer.convert_ids_to_tokens(row) for row in input_ids.tolist()]
    return {
        "activations": activations.cpu(),
        "tokens": tokens[0] if isinstance(text, str) else tokens,
        "input_ids": input_ids,
        "attention_mask": mask,
        "layer_idx": layer_idx,
    }


def _output_of(reader: TextActivations, layer_idx: int) -> HookPoint:
    """The output of a layer, for -1 that of the final norm, as in DeepLens's notebook."""
    if layer_idx == -1:
        return reader.point(None, "final_norm")
    depth = reader.depth
    if not -depth <= layer_idx < depth:
        negative = f", -2 to -{depth} to count them from the end" if depth > 1 else ""
        raise ValueError(
            f"layer_idx={layer_idx} is out of range: give 0 to {depth - 1} for the output of a layer{negative}, or -1 "
            "for that of the final norm"
        )
    return reader.point(layer_idx, "resid_post")
