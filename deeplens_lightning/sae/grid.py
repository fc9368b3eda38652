"""Train several SAEs side by side on the same batches: a sweep of settings, or one SAE for each hook point."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from torch import nn

from deeplens_lightning.sae.module import DictionaryTraining
from deeplens_lightning.sae.portable import PortableDictionary
from deeplens_lightning.sae.tuning import refuse_learning_rate_finder

_PARAMETERS = [name for name in inspect.signature(PortableDictionary).parameters if name != "d_in"]


class SparseAutoencoderGrid(DictionaryTraining):
    """Train several SAEs together, with one forward pass of the language model for all of them.

    Each SAE has its own weights, optimizer state (one Adam, a parameter group for each SAE), learning rate,
    clipping, counters and metrics (`val/fvu/<name>`), and ends with the weights of an SAE trained alone.

    Args:
        d_in: width of the rows; a dict by hook point if the data module serves several. On the command line
            it is taken from the data.
        sweep: lists of values by argument of `SparseAutoencoder`, all combinations of which are trained; or a
            list of dicts of arguments, one dict for each SAE. `{"input_hook": [...]}` trains one SAE for each
            hook point.
        shared: arguments of `SparseAutoencoder` that all SAEs get.

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
        self.save_hyperparameters({"d_in": d_in, "sweep": sweep, "shared": shared})
        settings = _combinations(sweep)
        _check_names([*settings, shared or {}])
        self.names = [_name(chosen) for chosen in settings]
        if len(set(self.names)) < len(self.names) or not settings:
            raise ValueError(f"sweep={sweep!r} must give at least one SAE, and different SAEs")
        saes = [PortableDictionary(d_in, **{**(shared or {}), **chosen}) for chosen in settings]
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
        """The SAE with this name."""
        return self.dictionaries[name]

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
        return [
            sae.export_saelens(Path(folder) / name.replace("/", "_"), overwrite=overwrite)
            for name, sae in self.dictionaries.items()
        ]

    def export_safetensors(self, folder: str | Path, *, overwrite: bool = False) -> list[Path]:
        """Write each SAE to a folder with its name in `folder`, which `SparseAutoencoder.from_safetensors` reads.

        Args:
            folder: where to write.
            overwrite: replace existing folders of the SAEs.

        Returns:
            The folders, in the order of `names`.

        Raises:
            FileExistsError: such a folder exists and `overwrite` is False.
        """
        return [
            sae.export_safetensors(Path(folder) / name.replace("/", "_"), overwrite=overwrite)
            for name, sae in self.dictionaries.items()
        ]


def _combinations(sweep: dict[str, list[Any]] | list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not isinstance(sweep, Mapping):
        return [dict(chosen) for chosen in sweep]
    return [dict(zip(sweep, values, strict=True)) for values in product(*sweep.values())]


def _check_names(settings: list[dict[str, Any]]) -> None:
    for name in {name for chosen in settings for name in chosen}:
        if name not in _PARAMETERS:
            near = get_close_matches(name, _PARAMETERS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"its arguments are {', '.join(_PARAMETERS)}"
            raise ValueError(f"SparseAutoencoder has no argument {name!r}; {hint}")


def _name(settings: dict[str, Any]) -> str:
    return ",".join(f"{name}={_word(value)}" for name, value in settings.items())


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        return "+".join(_word(v) for v in value.values())
    return "+".join(map(_word, value)) if isinstance(value, list | tuple) else str(value)
