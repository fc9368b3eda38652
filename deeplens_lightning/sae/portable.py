"""Use a dictionary outside training: splice it into a model, export it to or import it from other SAE libraries."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import Self

from deeplens_lightning.model.splicing import spliced
from deeplens_lightning.sae.dictionary import Dictionary
from deeplens_lightning.sae.interop import other_libraries, saelens, safetensors_folder


class PortableDictionary(Dictionary):
    """A `Dictionary` with methods to splice, export and import it.

    An import has the latents of the other library, and weights for raw rows. The first batch of a fit measures its units
    and rescales its weights to them: reconstructions stay equal, and all latents are multiplied by one factor.
    """

    def spliced(self, model: PreTrainedModel, hook: str) -> AbstractContextManager[PreTrainedModel]:
        """Run `model` with reconstructions in place of its activations: `with sae.spliced(model, name):`.

        Args:
            model: a whole Hugging Face model.
            hook: the hook point: canonical name, TransformerLens name or module path.

        Raises:
            ValueError: this is a transcoder or a crosscoder, which does not write what it reads.
        """
        if self.is_transcoder or len(self.read.hooks) > 1:
            raise ValueError(
                "only an autoencoder of one hook point can replace the activations that it reads; for a transcoder "
                "or crosscoder call deeplens_lightning.model.splicing.spliced with a function of your own"
            )
        return spliced(model, hook, self)

    @torch.no_grad()
    def direction(self, latent: int) -> Tensor | dict[str, Tensor]:
        """What one unit of a latent adds to the raw reconstruction: its row of `W_dec` in raw units, not of norm 1.

        Adding a multiple of it to raw activations `(..., d_in)` steers the model along the latent.

        Args:
            latent: number of the latent, counted from 0.

        Returns:
            `(d_in,)`, in float32 or a wider dtype of the weights; a dict by hook point if several are written.

        Raises:
            ValueError: there is no such latent.
        """
        if not 0 <= latent < self.d_sae:
            raise ValueError(
                f"latent={latent} is not in this SAE of {self.d_sae} latents: give a number from 0 to {self.d_sae - 1}"
            )
        return self.write.split(self.W_dec[latent] * (self.write.unit / self.write.scale))

    def export_saelens(
        self, folder: str | Path, *, metadata: Mapping[str, Any] | None = None, overwrite: bool = False
    ) -> Path:
        """Write a folder that `sae_lens.SAE.load_from_disk` reads, with equal latents and reconstructions.

        Args:
            folder: where to write; normalisation is folded into the weights.
            metadata: entries for the config's metadata beside `model_name` and `hook_name`.
            overwrite: replace an existing folder.

        Returns:
            The folder.

        Raises:
            FileExistsError: the folder exists and `overwrite` is False.
            ValueError: SAELens has no such architecture.
        """
        return saelens.export_saelens(self, folder, metadata=metadata, overwrite=overwrite)

    @classmethod
    def from_saelens(cls, folder: str | Path, *, ignore_fields: Collection[str] = ()) -> Self:
        """Read a folder that SAELens or `export_saelens` wrote.

        Args:
            folder: contains `cfg.json` and `sae_weights.safetensors`.
            ignore_fields: unknown fields of `cfg.json` that may be ignored.

        Raises:
            FileNotFoundError: there is no such folder or file.
            ValueError: an architecture or setting that this class does not have, or an unknown field.
        """
        return saelens.from_saelens(cls, folder, ignore_fields=ignore_fields)

    def export_safetensors(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write a folder that `from_safetensors` reads: any architecture, with its normalisation.

        Args:
            folder: where to write.
            overwrite: replace an existing folder.

        Returns:
            The folder.

        Raises:
            FileExistsError: the folder exists and `overwrite` is False.
        """
        return safetensors_folder.export_safetensors(self, folder, overwrite=overwrite)

    @classmethod
    def from_safetensors(cls, folder: str | Path) -> Self:
        """Read a folder that `export_safetensors` wrote.

        Args:
            folder: contains `config.json` and `sae.safetensors`.

        Raises:
            FileNotFoundError: there is no such folder or file.
            ValueError: the folder has another version.
        """
        return safetensors_folder.from_safetensors(cls, folder)

    @classmethod
    def from_dictionary_learning(cls, folder: str | Path) -> Self:
        """Read a folder of saprmarks/dictionary_learning: `ae.pt` and `config.json`.

        Args:
            folder: the folder.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: an unknown class of dictionary.
        """
        return other_libraries.from_dictionary_learning(cls, folder)

    @classmethod
    def from_sparsify(
        cls, folder: str | Path, *, input_hook: str = "input", output_hook: str = "output"
    ) -> Self:
        """Read a folder of EleutherAI/sparsify: `sae.safetensors` and `cfg.json`.

        Args:
            folder: the folder of one hook point.
            input_hook: name for the hook point that a transcoder reads.
            output_hook: name for the hook point that a transcoder writes.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: signed or grouped activations, or an autoencoder with a skip connection.
        """
        return other_libraries.from_sparsify(cls, folder, input_hook=input_hook, output_hook=output_hook)

    @classmethod
    def from_deeplens(cls, weights: str | Path | Mapping[str, Tensor], *, k: int | None = None) -> Self:
        """Read the weights of DeepLens's `SparseAutoencoder`: a file written by `torch.save`, or a state dict.

        Its LayerNorm becomes `layer_norm=True`, with its weight and bias folded into the encoder.

        Args:
            weights: a path, a state dict, or a checkpoint with one under "model_state_dict".
            k: the `k` that it was trained with; None for ReLU with L1.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: not such a state dict.
        """
        return other_libraries.from_deeplens(cls, weights, k=k)
