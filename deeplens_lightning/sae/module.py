"""`SparseAutoencoder`: a dictionary that is also the LightningModule that trains it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities.model_helpers import _restricted_classmethod
from typing_extensions import Self

from deeplens_lightning.sae.checkpoint_compatibility import one_of_grid
from deeplens_lightning.sae.dictionary import Dictionary
from deeplens_lightning.sae.portable import PortableDictionary
from deeplens_lightning.sae.training import DictionaryTraining


class SparseAutoencoder(PortableDictionary, DictionaryTraining):
    """Train a sparse dictionary of activations: autoencoder, transcoder or crosscoder.

    `encode`, `decode` and `forward` take and give raw activations, whatever normalisation it was trained with.
    """

    @property
    def dictionaries(self) -> Mapping[str, Dictionary]:
        """This dictionary, with the name ""."""
        return {"": self}

    def record_settings(self) -> None:
        """Save the constructor's arguments as hyperparameters, which checkpoints contain."""
        # Only numbers, strings and containers of them, which `weights_only=True` loads. No super() here: Lightning
        # would take this method for the constructor and look for the arguments among its local variables.
        self.save_hyperparameters(self.settings)

    @_restricted_classmethod
    def load_from_checkpoint(
        cls,  # noqa: N805
        checkpoint_path: Any,
        *args: Any,
        name: str | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load an SAE from its checkpoint, or one SAE of a grid from the checkpoint of the grid.

        Args:
            checkpoint_path: the file.
            *args: those of `LightningModule.load_from_checkpoint`.
            name: the name of one SAE of a grid, such as "k=32"; the checkpoint is then a local file, and the SAE is on
                the CPU.
            **kwargs: those of `LightningModule.load_from_checkpoint`, and settings that replace those of the checkpoint.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the grid has no SAE of this name, or there are several and `name` is not given (the message lists
                the names); a setting that the weights do not work with.
        """
        if name is not None:
            checkpoint_path = one_of_grid(checkpoint_path, name)
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As for a grid; the hyperparameters get the learning rate with which a resumed fit continues.

        Raises:
            ValueError: the checkpoint holds a grid or other settings, or is damaged.
        """
        before = self.lr
        super().on_load_checkpoint(checkpoint)
        if self.lr != before:
            self.hparams["lr"] = self.lr
