"""A text in, the activations of each of its tokens out: one text at a time, nothing packed or mixed.

`TextActivations` either loads a model of its own when it is first asked, or reads through a
`FrozenModel` that somebody else owns.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.model.hook_points import HookPoint, resolve
from deeplens_lightning.model.pretrained import load_config, load_tokenizer, max_positions
from deeplens_lightning.text.tokens import special_affixes
from deeplens_lightning.types import device_of


class TextActivations:
    """Reads hook points of one model on single texts.

    Args:
        hf_model: hub id, local folder, GGUF file, `demo:lm` or a loaded model; loaded when first needed.
        max_length: longer texts are cut to so many tokens (or the model's positions, if fewer); said once.
        device: `auto`, or where the model is to be.
        tokenizer: default the model's own.
        model_kwargs: for `from_pretrained`.
        frozen: a model that is loaded already, whose owner closes it; only its own hook points can be read.
        prepend_bos: None for what the tokenizer itself puts around a text, True for a BOS in front in any
            case, False for no special tokens.
    """

    def __init__(
        self,
        hf_model: str | PreTrainedModel,
        *,
        max_length: int = 1024,
        device: str | torch.device = "auto",
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        frozen: FrozenModel | None = None,
        prepend_bos: bool | None = None,
    ) -> None:
        if max_length < 1:
            raise ValueError(f"max_length={max_length} keeps no token; it must be at least 1")
        self.hf_model = hf_model
        self.max_length = max_length
        self.device = device
        self.model_kwargs = model_kwargs
        self.prepend_bos = prepend_bos
        self._tokenizer_source = tokenizer
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._frozen = frozen
        self._borrowed = frozen is not None
        self._config: PretrainedConfig | None = frozen.config if frozen is not None else None
        self._said_cut = False

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer whose tokens the rows belong to."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.hf_model, self._tokenizer_source, self.model_kwargs)
        return self._tokenizer

    @property
    def config(self) -> PretrainedConfig:
        """The model's configuration; reading it loads no weights."""
        if self._config is None:
            model = self.hf_model
            self._config = (
                model.config if isinstance(model, PreTrainedModel) else load_config(model, self.model_kwargs)
            )
        return self._config

    def point(self, layer: int | None, hook: str) -> HookPoint:
        """The one hook point that `layer` and `hook` name.

        Raises:
            ValueError: it does not exist, or a list was given.
        """
        source = self.hf_model if isinstance(self.hf_model, PreTrainedModel) else self.config
        points = resolve(source, layer, hook)
        if len(points) != 1:
            names = ", ".join(point.name for point in points)
            raise ValueError(f"a single sample reads one hook point, but {names} were named; choose one")
        return points[0]

    def token_ids(self, text: str) -> list[int]:
        """Token ids of a text, special tokens as its tokenizer adds them, cut to the allowed length.

        Raises:
            TypeError: `text` is not a string.
            ValueError: the text has no tokens, or one that the model has no embedding for.
        """
        if not isinstance(text, str):
            raise TypeError(
                f"text must be a string, got {type(text).__name__}; pass several texts one by one"
            )
        own = self.prepend_bos is None
        ids: list[int] = self.tokenizer(text, add_special_tokens=own, truncation=False, verbose=False)[
            "input_ids"
        ]
        if not text.strip() or not ids:
            raise ValueError(f"text={text!r} is empty: there is no token whose activations could be read")
        prefix, suffix = ((), ()) if own else special_affixes(self.tokenizer, self.prepend_bos)
        ids = [*prefix, *ids, *suffix]
        limit = self._limit()
        if len(ids) > limit:
            self._say_cut(len(ids), limit)
            ids = ids[:limit]
        self._check_vocabulary(ids)
        return ids

    def rows(self, ids: Sequence[int], points: Sequence[HookPoint]) -> dict[str, Tensor]:
        """Activations of one text: `(seq_length, d_in)` by hook point, on the model's device."""
        batch = self.padded(torch.tensor([list(ids)]), None, points)
        return {name: x[0] for name, x in batch.items()}

    def padded(
        self, input_ids: Tensor, attention_mask: Tensor | None, points: Sequence[HookPoint]
    ) -> dict[str, Tensor]:
        """Activations of several texts, padded on the right: `(batch, seq_length, d_in)` by hook point.

        Args:
            input_ids: int64 `(batch, seq_length)`.
            attention_mask: int64 `(batch, seq_length)`, 0 at pads; None where there are none.
            points: where to read.
        """
        read = self._model(points).activations(input_ids, None, attention_mask)
        return {point.name: read[point.name] for point in points}

    def close(self) -> None:
        """Let go of the model; a borrowed one stays its owner's. The next read loads one again."""
        if self._frozen is not None and not self._borrowed:
            self._frozen.close()
        self._frozen, self._borrowed = None, False

    def _model(self, points: Sequence[HookPoint]) -> FrozenModel:
        here = {} if self._frozen is None else {point.name: point for point in self._frozen.hook_points}
        missing = [point for point in points if point.name not in here]
        if self._frozen is not None and not missing:
            return self._frozen
        if self._borrowed:
            raise ValueError(
                f"the data module's model reads {', '.join(here)}, not {missing[0].name}; leave layer and "
                'hook out, or name a model of its own with hf_model="..."'
            )
        # One model at a time: what was read before stays readable, and the deepest decides what is loaded.
        self.close()
        self._frozen = FrozenModel.load(
            self.hf_model,
            (*here.values(), *missing),
            device=device_of(self.device),
            model_kwargs=self.model_kwargs,
            isolation="padded",
        )
        return self._frozen

    def _limit(self) -> int:
        positions = max_positions(self.config)
        return self.max_length if positions is None else min(self.max_length, positions)

    def _say_cut(self, length: int, limit: int) -> None:
        if not self._said_cut:
            self._said_cut = True
            reason = "max_length" if limit == self.max_length else "the model's positions"
            warnings.warn(
                f"a text of {length} tokens was cut to {limit} ({reason}); later ones will be cut silently",
                stacklevel=4,
            )

    def _check_vocabulary(self, ids: Sequence[int]) -> None:
        size = getattr(self.config, "vocab_size", None)
        worst = max(ids)
        if isinstance(size, int) and worst >= size:
            token = self.tokenizer.convert_ids_to_tokens([worst])[0]
            raise ValueError(
                f"token id {worst} ({token!r}) is outside the model's vocabulary of {size}: this tokenizer "
                "belongs to another model; pass the right one as tokenizer="
            )


def read_batch(reader: TextActivations, text: str | Sequence[str], layer_idx: int) -> dict[str, Any]:
    """The dictionary of the activations notebook.

    Args:
        reader: whose model and tokenizer to use.
        text: one text, or a list that is padded on the right.
        layer_idx: a block, whose output is read; -1 is the final norm, and blocks further from the end
            count as Python does (-2 is the last but one).

    Returns:
        `activations` `(batch, seq_length, hidden)` on the CPU; `tokens`, vocabulary entries of the text
        (a list of such lists for several); `input_ids` and `attention_mask` int64 `(batch, seq_length)`
        on the CPU; `layer_idx`.
    """
    texts = [text] if isinstance(text, str) else list(text)
    if not texts:
        raise ValueError("an empty list of texts has no activations")
    point = reader.point(None, "final_norm") if layer_idx == -1 else reader.point(layer_idx, "resid_post")
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
