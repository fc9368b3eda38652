"""Describe the settings of a data module with plain values, for loggers and checkpoints.

In: `DataSettings`. Out: numbers, strings, lists and dicts of them. A loaded model, a tokenizer or a dataset becomes a
readable name, and secrets are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from lightning.fabric.utilities.data import AttributeDict
from lightning.pytorch import Trainer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deeplens_lightning.options import values
from deeplens_lightning.stream.settings import DataSettings
from deeplens_lightning.text.local_files import paths_in

RECORD = "data"
"""Name of the settings among the hyperparameters."""
SECRETS = ("token", "use_auth_token", "key", "api_key", "secret", "password")
"""Keyword arguments, for example of `from_pretrained`, whose values are not recorded."""


def recorded_settings(settings: DataSettings) -> dict[str, Any]:
    """The settings by name, as values that YAML, JSON and `torch.load(weights_only=True)` read."""
    record: dict[str, Any] = _plain(values(settings))
    texts = settings.dataset_name
    if isinstance(texts, list) and not paths_in(texts):
        record["dataset_name"] = f"list of {len(texts)} texts"
    return record


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(name): "not recorded" if name in SECRETS else _plain(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    if is_dataclass(value):
        return _plain(values(value))
    if isinstance(value, torch.Tensor):
        return f"tensor of shape {tuple(value.shape)}"
    if isinstance(value, datasets.Dataset):
        return f"Dataset of {len(value)} rows"
    if isinstance(value, PreTrainedModel | PreTrainedTokenizerBase):
        return f"{type(value).__name__} {value.name_or_path}".strip()
    return str(value) if isinstance(value, torch.dtype | torch.device | Path) else type(value).__name__


def beside(recorded: AttributeDict, trainer: Trainer | None) -> AttributeDict:
    """The hyperparameters of a data module under names that loggers can show beside those of a LightningModule.

    Args:
        recorded: hyperparameters, with the settings as "data"; changed in place.
        trainer: the Trainer of the LightningModule; None without one.

    Returns:
        The same, with the settings as "activation_data" if the module has a hyperparameter "data": Lightning refuses a
        fit in which both have different values under one name.
    """
    module = trainer.lightning_module if trainer is not None else None
    if module is not None and RECORD in module.hparams_initial:
        recorded[f"activation_{RECORD}"] = recorded.pop(RECORD)
    return recorded
