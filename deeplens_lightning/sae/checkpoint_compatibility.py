"""Describe the SAEs of a module in its checkpoint, and reject the checkpoint of SAEs with other names or settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from deeplens_lightning.disk.records import RecordError, read_record, to_plain
from deeplens_lightning.disk.torch_files import check_checkpoint_file
from deeplens_lightning.sae.architectures import architecture_spec
from deeplens_lightning.sae.dictionary import Dictionary
from deeplens_lightning.sae.schedule import Optimization, default_lr
from deeplens_lightning.sae.sweep import sweep_arguments, unknown_name, with_defaults
from deeplens_lightning.sae.tuning import saved_peaks

_OF_WEIGHTS = ("d_in", "d_sae", "expansion_factor", "input_hook", "output_hook", "skip", "layer_norm")
"""Settings without which the weights mean something else."""
_OF_MEASURING = ("architecture", "k")
"""Further settings that change figures; arguments of `load_from_checkpoint` may replace them."""
_OF_TRAINING = (*(f"optimization.{name}" for name in asdict(Optimization())), "dead_after_tokens")
"""Further settings that change training. Not `lr`: a fit continues with that of the optimizer's state, and says so."""
_KEPT = ("epoch", "global_step", "pytorch-lightning_version")


@dataclass(frozen=True, kw_only=True)
class _One:
    """The description of a single SAE in a checkpoint."""

    trained_on: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Several:
    """The description of the SAEs of a grid in a checkpoint, by name."""

    trained_on: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """The settings of the SAEs in a checkpoint, by name; a single one has the name ""."""

    sae_settings: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class _Sweep:
    """The hyperparameters of a grid in a checkpoint without `sae_settings`, as earlier releases wrote it."""

    d_in: int | Mapping[str, int]
    sweep: Mapping[str, tuple[Any, ...]] | tuple[Mapping[str, Any], ...]
    shared: Mapping[str, Any] | None = None


def describe(saes: Mapping[str, Dictionary]) -> dict[str, Any]:
    """Entries of a checkpoint: the settings of each SAE by name, and what it was trained on.

    Args:
        saes: by name; a single one has the name "".
    """
    trained_on = {name: dict(sae.trained_on) for name, sae in saes.items()}
    return {
        "sae_settings": {name: to_plain(sae.settings) for name, sae in saes.items()},
        "trained_on": trained_on.get("", trained_on),
    }


def read_trained_on(checkpoint: Mapping[str, Any], names: Iterable[str]) -> dict[str, dict[str, str]]:
    """What each SAE of a checkpoint was trained on; empty where the checkpoint does not say it.

    Args:
        checkpoint: a Trainer's checkpoint.
        names: names of its SAEs; a single one has the name "".

    Raises:
        RecordError: the entry holds something else than strings by name.
    """
    entries = {name: value for name, value in checkpoint.items() if name == "trained_on"}
    if list(names) == [""]:
        return {"": dict(read_record(_One, entries, "the checkpoint").trained_on)}
    found = read_record(_Several, entries, "the checkpoint").trained_on
    return {name: dict(found.get(name, {})) for name in names}


def saved_settings(checkpoint: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """The settings of the SAEs in a checkpoint by name; a single SAE has the name "".

    Raises:
        RecordError: the checkpoint holds no settings by name.
    """
    if "sae_settings" in checkpoint:
        entries = {"sae_settings": checkpoint["sae_settings"]}
        return read_record(_Settings, entries, "the checkpoint").sae_settings
    given = checkpoint.get("hyper_parameters", {})
    if not isinstance(given, Mapping):
        raise RecordError(
            f"the hyperparameters in the checkpoint are a {type(given).__name__}: take another checkpoint"
        )
    if "sweep" not in given:
        return {"": given}
    entries = {name: given[name] for name in ("d_in", "sweep", "shared") if name in given}
    grid = read_record(_Sweep, to_plain(entries), "the hyperparameters in the checkpoint")
    arguments = sweep_arguments(grid.sweep, grid.shared)
    return {name: with_defaults({"d_in": grid.d_in, **each}) for name, each in arguments.items()}


def check_checkpoint(
    mine: Mapping[str, Mapping[str, Any]], checkpoint: Mapping[str, Any], stage: TrainerFn | None
) -> None:
    """Check that a checkpoint holds SAEs with the same names, in the same order, and the same settings.

    Args:
        mine: settings by name of the SAEs that the checkpoint is loaded into; a single one has the name "".
        checkpoint: a Trainer's checkpoint.
        stage: what the Trainer does; None without a Trainer.

    Raises:
        ValueError: they differ (the message names the first difference), or the checkpoint is damaged.
    """
    saved = saved_settings(checkpoint)
    _check_names(list(mine), list(saved))
    compared = [*_OF_WEIGHTS]
    if stage is not None:
        compared += _OF_MEASURING
    if stage == TrainerFn.FITTING:
        compared += _OF_TRAINING
    for name in mine:
        ours, theirs = _comparable(mine[name]), _comparable(saved[name])
        for setting in compared:
            if setting in ours and setting in theirs and ours[setting] != theirs[setting]:
                raise ValueError(
                    f"the checkpoint holds {f'the SAE {name!r}' if name else 'an SAE'} with "
                    f"{setting}={theirs[setting]!r}, this one has {ours[setting]!r}: set "
                    f"{setting}={theirs[setting]!r}, or {_instead(setting, grid=bool(name))}"
                )


def continue_learning_rates(saes: Mapping[str, Dictionary], checkpoint: Mapping[str, Any]) -> None:
    """Continue with the learning rates of a checkpoint, and warn where another one was given."""
    for sae, lr in zip(saes.values(), saved_peaks(checkpoint), strict=False):
        if sae.lr != lr and (sae.settings["lr"] is not None or sae.lr != default_lr(sae.d_sae)):
            rank_zero_warn(f"lr={sae.lr} is not used: the fit continues with lr={lr} of the checkpoint")
        sae.lr = lr


def one_of_grid(path: str | Path, name: str) -> BytesIO:
    """The checkpoint of one SAE, without the optimizer's state, from the checkpoint of a grid.

    Args:
        path: a local file, of which only the weights of this SAE are read.
        name: the name of the SAE.

    Returns:
        A file in memory, with tensors on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the checkpoint holds a single SAE, or none with this name (the message lists the names).
    """
    check_checkpoint_file(path)
    checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    settings = saved_settings(checkpoint)
    if list(settings) == [""]:
        raise ValueError(f"the checkpoint holds a single SAE, which has no name: leave out name={name!r}")
    if name not in settings:
        raise ValueError(unknown_name(name, settings))
    prefix = f"saes.{list(settings).index(name)}."
    weights = {
        key.removeprefix(prefix): tensor
        for key, tensor in checkpoint["state_dict"].items()
        if key.startswith(prefix)
    }
    one = {
        **{key: checkpoint[key] for key in _KEPT},
        "state_dict": weights,
        "hyper_parameters": dict(settings[name]),
        "sae_settings": {"": settings[name]},
        "trained_on": read_trained_on(checkpoint, settings)[name],
    }
    file = BytesIO()
    torch.save(one, file)
    file.seek(0)
    return file


def _check_names(mine: list[str], saved: list[str]) -> None:
    if mine == saved:
        return
    if saved == [""]:
        raise ValueError(
            f"the checkpoint holds a single SAE, this grid has {', '.join(mine)}: use "
            "SparseAutoencoder.load_from_checkpoint(path)"
        )
    one = f"load one of them with SparseAutoencoder.load_from_checkpoint(path, name={saved[0]!r})"
    if mine == [""]:
        raise ValueError(
            f"the checkpoint holds a grid of the SAEs {', '.join(saved)}: {one}, or all of them with "
            "SparseAutoencoderGrid.load_from_checkpoint(path)"
        )
    raise ValueError(
        f"the checkpoint holds the SAEs {', '.join(saved)}, this grid has {', '.join(mine)}: give the sweep of the "
        f"checkpoint, in its order, or {one}"
    )


def _comparable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in one form, whether they were given in Python, in YAML or in a checkpoint."""
    plain = cast("dict[str, Any]", to_plain(dict(settings)))
    if "architecture" in plain:
        plain["architecture"] = architecture_spec(plain["architecture"])
    if "optimization" in plain:
        for name, value in to_plain(Optimization.of(plain.pop("optimization"))).items():
            plain[f"optimization.{name}"] = value
    return plain


def _instead(setting: str, *, grid: bool) -> str:
    """What to do in place of setting the value of the checkpoint."""
    load = f"SparseAutoencoder{'Grid' if grid else ''}.load_from_checkpoint"
    if setting in _OF_WEIGHTS:
        return f"use {load}(path)"
    changed = "shared" if grid else setting.partition(".")[0]
    return f"for a new run with its weights use {load}(path, {changed}=...) without ckpt_path"
