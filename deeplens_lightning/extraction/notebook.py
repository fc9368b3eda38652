"""`ActivationExtractor`: the activations notebook's own class, on this package's frozen model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deeplens_lightning.model.single_text import TextActivations, read_batch
from deeplens_lightning.types import device_of


class ActivationExtractor:
    """Extracts a block's output, or the final norm's, for the tokens of a text.

    Args:
        model_name: hub id, local folder, GGUF file, `demo:lm` or a loaded model. Loaded on first use.
        device: `cpu`, `cuda`, `mps` or `auto`.
        max_length: longer texts are cut to so many tokens; said once.
        model_kwargs: for `from_pretrained`, e.g. a dtype.
    """

    def __init__(
        self,
        model_name: str | PreTrainedModel = "gpt2",
        device: str = "cpu",
        *,
        max_length: int = 1024,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.model_name = model_name
        self.device = str(device_of(device))
        self._reader = TextActivations(
            model_name, max_length=max_length, device=self.device, model_kwargs=model_kwargs
        )

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self._reader.tokenizer

    def get_activations(self, text: str | Sequence[str], layer_idx: int = -1) -> dict[str, Any]:
        """The notebook's dictionary for one text, or for a list of texts padded on the right.

        Args:
            text: one text or several.
            layer_idx: a block's index, whose output is read, or -1 for the final norm.

        Returns:
            `activations` `(batch, seq_length, hidden)`, `tokens`, `input_ids`, `attention_mask` and
            `layer_idx`, all tensors on the CPU.

        Raises:
            ValueError: a text is empty, or the layer is out of range.
        """
        return read_batch(self._reader, text, layer_idx)
