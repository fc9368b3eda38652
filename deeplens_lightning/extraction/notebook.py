"""`ActivationExtractor`: the activations of a text, with the class of DeepLens's activations notebook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deeplens_lightning.devices import device_of
from deeplens_lightning.model.single_text import TextActivations, read_batch


class ActivationExtractor:
    """Extract the output of a block, or of the final norm, for every token of a text.

    Attributes:
        model_name: as given.
        device: where the model runs, by name.
    """

    def __init__(
        self,
        model_name: str | PreTrainedModel = "gpt2",
        device: str = "cpu",
        *,
        max_length: int = 1024,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Name the model; it is loaded when activations are first extracted.

        Args:
            model_name: hub id, local folder, GGUF file, `demo:lm` or a loaded model.
            device: `cpu`, `cuda`, `cuda:1`, `mps`, or `auto` for the first of CUDA, MPS and the CPU that is there.
            max_length: maximum number of tokens; longer texts are cut, with a warning the first time.
            model_kwargs: arguments of `from_pretrained`, such as a dtype.
        """
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
        """Run the model on one text, or on several texts padded on the right.

        Args:
            text: one text or several.
            layer_idx: index of the block whose output is read, from 0; -1 for the output of the final norm.

        Returns:
            A dictionary with `activations` `(batch, seq_length, hidden)` in the model's dtype, `tokens` (strings),
            `input_ids` and `attention_mask` `(batch, seq_length)`, and `layer_idx`. Tensors are on the CPU.

        Raises:
            ValueError: a text is empty, or the layer is out of range.
        """
        return read_batch(self._reader, text, layer_idx)
