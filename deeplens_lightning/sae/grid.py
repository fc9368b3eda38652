"""Several SAEs side by side on one stream: a sweep of settings, or one SAE for each hook point."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from typing import Any

from torch import nn

from deeplens_lightning.sae.module import SparseAutoencoder
from deeplens_lightning.sae.training import DictionaryTraining

_PARAMETERS = [name for name in inspect.signature(SparseAutoencoder).parameters if name != "d_in"]


class SparseAutoencoderGrid(DictionaryTraining):
    """SAEs that train together from one forward pass of the model.

    Each has its own weights, optimizer state (one Adam, a parameter group each), learning rate,
    clipping, counters and metrics (`val/fvu/<name>`), and ends as if it had been trained alone.

    Args:
        d_in: as for `SparseAutoencoder`; usually linked from the data.
        sweep: lists of values by argument of `SparseAutoencoder`, of which all combinations are
            trained, or a list of settings, one for each SAE. `{"input_hook": [...]}` gives one SAE for
            each hook point.
        shared: arguments that all of them get.

    Raises:
        ValueError: an argument that `SparseAutoencoder` does not have, or two equal SAEs.
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
            raise ValueError(f"sweep={sweep!r} must name different SAEs, at least one")
        self.saes = nn.ModuleList(
            SparseAutoencoder(d_in, **{**(shared or {}), **chosen}) for chosen in settings
        )

    @property
    def dictionaries(self) -> dict[str, SparseAutoencoder]:
        """The SAEs by name, such as "k=32,seed=1"."""
        return dict(zip(self.names, self.saes, strict=True))  # type: ignore[arg-type]

    def __getitem__(self, name: str) -> SparseAutoencoder:
        """The SAE of that name."""
        return self.dictionaries[name]

    def export_saelens(self, folder: str | Path, *, overwrite: bool = False) -> list[Path]:
        """Export each into a folder of its own below `folder`; see `SparseAutoencoder.export_saelens`."""
        return [
            sae.export_saelens(Path(folder) / name.replace("/", "_"), overwrite=overwrite)
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
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(_PARAMETERS)}"
            raise ValueError(f"SparseAutoencoder has no argument {name!r}; {hint}")


def _name(settings: dict[str, Any]) -> str:
    return ",".join(f"{name}={_word(value)}" for name, value in settings.items())


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        return "+".join(_word(v) for v in value.values())
    return "+".join(map(_word, value)) if isinstance(value, list | tuple) else str(value)
