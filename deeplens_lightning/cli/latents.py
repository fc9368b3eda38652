"""The command `latents`: the text on which chosen latents of a finished run are most active.

In: the folder of a run, whose checkpoint holds the SAE and the settings of the data. Out: the contexts, printed, and
written to the run's folder, where `report` finds them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from deeplens_lightning.callbacks.support import folder_name
from deeplens_lightning.cli.newest_checkpoint import newest_checkpoint
from deeplens_lightning.datamodule import ActivationDataModule
from deeplens_lightning.devices import device_of
from deeplens_lightning.extraction.latent_contexts import ROWS, top_contexts
from deeplens_lightning.options import BufferOptions, CacheOptions, ModelOptions, TextOptions
from deeplens_lightning.reporting.run_data import find_run, read_run
from deeplens_lightning.reporting.run_folder import write_json
from deeplens_lightning.sae import SparseAutoencoder, SparseAutoencoderGrid
from deeplens_lightning.sae.training import DictionaryTraining

CHOSEN = "chosen_latents"
_GROUPS = {
    "text_options": TextOptions,
    "model_options": ModelOptions,
    "buffer_options": BufferOptions,
    "cache_options": CacheOptions,
}


def latents(
    run_dir: str,
    ids: list[int] | None = None,
    checkpoint: str | None = None,
    sae: str | None = None,
    rows: int = ROWS,
    keep: int = 8,
    before: int = 24,
    after: int = 8,
    shards: str | None = None,
    hf_model: str | None = None,
    dataset_name: str | None = None,
    text_column: str | None = None,
    device: str = "auto",
) -> None:
    """Print the text on which chosen latents of a finished run are most active, and write it for the report.

    Args:
        run_dir: folder of a run, or a folder of several runs: the newest fit is taken.
        ids: numbers of the latents, such as --ids 5 17.
        checkpoint: checkpoint of the run; default that of its last weights.
        sae: name of one SAE of a grid, such as k=32; default the first.
        rows: largest number of rows to search.
        keep: number of contexts of each latent.
        before: number of tokens to show before the one on which the latent is active.
        after: number of tokens to show after it.
        shards: cache to search, written by extract; default the data of the run.
        hf_model: the language model: hub id, folder, GGUF file, or demo:lm; default that of the run.
        dataset_name: other text to search: hub id, path or glob of txt, jsonl or parquet files, or demo:docs.
        text_column: column of the dataset with texts.
        device: cpu, cuda, cuda:1, mps, or auto.
    """
    if not ids:
        raise ValueError("name the latents: --ids 5 17")
    folder = find_run(Path(run_dir), holds_weights)
    path = Path(checkpoint) if checkpoint is not None else _last_checkpoint(folder)
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    module = _module(path, saved.get("hyper_parameters", {})).to(device_of(device))
    changes = {"hf_model": hf_model, "dataset_name": dataset_name, "text_column": text_column}
    data = _data(
        _hooks(module, sae),
        saved.get("datamodule_hyper_parameters", {}).get("data"),
        shards,
        {name: value for name, value in changes.items() if value is not None} | {"device": device},
    )
    try:
        found = top_contexts(module, data, ids, rows=rows, keep=keep, before=before, after=after, sae=sae)
    finally:
        data.teardown()
    place = folder / (CHOSEN if sae is None else f"{CHOSEN}-{folder_name(sae)}")
    print(found)
    for each in found.latents:
        one = replace(found, latents=[each])
        write_json(place / f"{each.latent}.json", one.as_json(saved["global_step"]))
    print(f"\n{found.rows:,} rows searched; deeplens-lightning report {folder} shows these latents, too")


def holds_weights(run: Path) -> bool:
    """Whether a run's folder holds or names a checkpoint, as that of a fit does and that of a validation does not."""
    return (run / "summary.json").is_file() or next(run.rglob("*.ckpt"), None) is not None


def _last_checkpoint(folder: Path) -> Path:
    """The file of the last weights, which the summary names; without a summary, the newest checkpoint in the folder."""
    summary = read_run(folder).summary or {}
    last = Path((summary.get("last") or {}).get("file") or "")
    path = last if last.is_file() else newest_checkpoint(folder)
    if path is None:
        raise FileNotFoundError(f"{folder} holds no checkpoint: give one with --checkpoint FILE")
    return path


def _module(path: Path, settings: Mapping[str, Any]) -> DictionaryTraining:
    """The SAE or the grid of a checkpoint."""
    if "sweep" in settings:
        return SparseAutoencoderGrid.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    if {"d_in", "d_sae"} <= settings.keys():
        return SparseAutoencoder.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    raise ValueError(
        f"{path} holds neither a SparseAutoencoder nor a SparseAutoencoderGrid: in Python, call "
        "deeplens_lightning.top_contexts(module, data, ids)"
    )


def _hooks(module: DictionaryTraining, sae: str | None) -> list[str]:
    """The hook points that the SAE was trained on; empty if it does not say."""
    name = next(iter(module.dictionaries)) if sae is None else sae
    chosen = module.dictionaries.get(name)  # a name that is not there is refused later
    return list(filter(None, "" if chosen is None else chosen.trained_on.get("hook_name", "").split(",")))


def _data(
    hooks: Sequence[str],
    recorded: Mapping[str, Any] | None,
    shards: str | None,
    changes: Mapping[str, Any],
) -> ActivationDataModule:
    """The data module of a run, opened, from the settings in its checkpoint with changes; or one that reads a cache."""
    settings = dict(recorded or {})
    if shards is not None:
        kept = ("hf_model",) if hooks else ("hf_model", "layer", "hook")
        settings = {name: settings[name] for name in kept if name in settings}
        settings |= {"shards": shards} | ({"hook": list(hooks)} if hooks else {})
    elif not settings and "dataset_name" not in changes:
        raise ValueError(
            "the checkpoint does not say what text the run read, as its data module is not an ActivationDataModule: "
            "give --shards, or --hf_model and --dataset_name"
        )
    if "dataset_name" in changes:  # these belong to the run's own dataset
        for name in ("dataset_split", "text_column"):
            settings.pop(name, None)
        settings["text_options"] = dict(settings.get("text_options", {})) | {"dataset_kwargs": None}
    for name, kind in _GROUPS.items():
        if name in settings:
            settings[name] = kind(**settings[name])
    if settings.pop("write_shards", None):
        settings.pop("cache_options")
    own = shards is None and "dataset_name" not in changes
    try:
        data = ActivationDataModule(**{**settings, **changes})
        data.prepare_data()
        data.setup()
    except (ValueError, OSError) as error:
        if not own:
            raise
        raise ValueError(
            f"the data of the run cannot be opened again ({error}): give --shards, or --hf_model and --dataset_name"
        ) from error
    return data
