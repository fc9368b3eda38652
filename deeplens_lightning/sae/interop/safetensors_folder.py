"""Export and import a dictionary of any architecture: `config.json` and `sae.safetensors`, with its normalisation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load_file, save_file

from deeplens_lightning.disk.files import write_whole
from deeplens_lightning.sae.dictionary import Dictionary
from deeplens_lightning.sae.interop.files import fresh_folder

D = TypeVar("D", bound=Dictionary)

CONFIG, WEIGHTS = "config.json", "sae.safetensors"
FORMAT = 1


def export_safetensors(sae: Dictionary, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write a folder that `from_safetensors` reads: the constructor's arguments and the whole state.

    Arguments, result and errors are those of `PortableDictionary.export_safetensors`.
    """
    config = {"format": FORMAT, "settings": sae.settings, "trained_on": sae.trained_on}
    state = {name: value.detach().cpu().contiguous() for name, value in sae.state_dict().items()}
    with fresh_folder(folder, overwrite=overwrite) as new:
        save_file(state, new / WEIGHTS)
        write_whole(new / CONFIG, json.dumps(config, indent=2).encode())
    return Path(folder)


def from_safetensors(kind: type[D], folder: str | Path) -> D:
    """Read a folder that `export_safetensors` wrote.

    Arguments, result and errors are those of `PortableDictionary.from_safetensors`, with the class to build as `kind`.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} holds no {name}: give a folder that export_safetensors wrote, or use from_saelens"
            )
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    if config.get("format") != FORMAT:
        raise ValueError(
            f"{folder / CONFIG} has format {config.get('format')}, this version reads {FORMAT}: update the package"
        )
    sae = kind(**config["settings"])
    sae.load_state_dict(load_file(folder / WEIGHTS))
    sae.trained_on = dict(config["trained_on"])
    return sae
