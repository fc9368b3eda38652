"""Train several SAEs side by side on the same batches: a sweep of settings, or one SAE for each hook point."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from torch import nn

from deeplens_lightning.disk.records import to_plain
from deeplens_lightning.sae.portable import PortableDictionary
from deeplens_lightning.sae.sweep import sweep_arguments, unknown_name
from deeplens_lightning.sae.training import DictionaryTraining
from deeplens_lightning.sae.tuning import refuse_learning_rate_finder


class SparseAutoencoderGrid(DictionaryTraining):
    """Train several SAEs together, with one forward pass of the language model for all of them.

    Each SAE has its own weights, optimizer state (one Adam, a parameter group for each SAE), learning rate,
    clipping, counters and metrics (`val/fvu/<name>`), and ends with the weights of an SAE trained alone.
    `SparseAutoencoder.load_from_checkpoint(path, name=...)` loads one of them from a checkpoint of the grid.

    Args:
        d_in: width of the rows; a dict by hook point if the data module serves several. On the command line
            it is taken from the data.
        sweep: lists of values by argument of `SparseAutoencoder`, all combinations of which are trained; or a
            list of dicts of arguments, one dict for each SAE. `{"input_hook": [...]}` trains one SAE for each
            hook point.
        shared: arguments of `SparseAutoencoder` that all SAEs get.

    Attributes:
        names: the names of the SAEs, such as "k=32,seed=1".

    Raises:
        ValueError: `SparseAutoencoder` has no such argument, two SAEs have the same settings, or there is none.
    """

    def __init__(
        self,
        d_in: int | dict[str, int],
        sweep: dict[str, list[Any]] | list[dict[str, Any]],
        shared: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        # Plain values, without `Optimization`: checkpoints contain them, and `weights_only=True` loads nothing else.
        plain = to_plain({"d_in": d_in, "sweep": sweep, "shared": shared})
        self.save_hyperparameters(plain)
        arguments = sweep_arguments(plain["sweep"], plain["shared"])
        self.names = list(arguments)
        saes = [PortableDictionary(d_in, **each) for each in arguments.values()]
        self.saes = nn.ModuleList(saes)
        self._by_name = dict(zip(self.names, saes, strict=True))

    @property
    def dictionaries(self) -> Mapping[str, PortableDictionary]:
        """The SAEs by name, such as "k=32,seed=1"."""
        return self._by_name

    def configure_callbacks(self) -> list[Callback]:
        """Refuse a `LearningRateFinder`, which sets one learning rate; otherwise as for one SAE.

        Raises:
            ValueError: there is one among the Trainer's callbacks.
        """
        refuse_learning_rate_finder(self.trainer)
        return super().configure_callbacks()

    def __getitem__(self, name: str) -> PortableDictionary:
        """The SAE with this name.

        Raises:
            KeyError: there is none; the message lists the names.
        """
        if name not in self._by_name:
            raise KeyError(unknown_name(name, self.names))
        return self._by_name[name]

    def export_saelens(self, folder: str | Path, *, overwrite: bool = False) -> list[Path]:
        """Write each SAE in SAELens's format to a folder with its name in `folder`.

        Args:
            folder: where to write.
            overwrite: replace existing folders of the SAEs.

        Returns:
            The folders, in the order of `names`.

        Raises:
            FileExistsError: such a folder exists and `overwrite` is False.
            ValueError: SAELens has no such architecture.
        """
        return self._export(PortableDictionary.export_saelens, folder, overwrite)

    def export_safetensors(self, folder: str | Path, *, overwrite: bool = False) -> list[Path]:
        """Write each SAE to a folder that `SparseAutoencoder.from_safetensors` reads; otherwise as `export_saelens`."""
        return self._export(PortableDictionary.export_safetensors, folder, overwrite)

    def _export(self, export: Callable[..., Path], folder: str | Path, overwrite: bool) -> list[Path]:
        return [
            export(sae, Path(folder) / name.replace("/", "_"), overwrite=overwrite)
            for name, sae in self._by_name.items()
        ]
