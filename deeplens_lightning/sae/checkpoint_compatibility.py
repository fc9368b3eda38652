"""Read what a checkpoint says about its SAE, and reject another kind or size of dictionary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deeplens_lightning.disk.records import RecordError, read_record

_KIND_AND_SIZE = (
    "d_in",
    "d_sae",
    "expansion_factor",
    "architecture",
    "input_hook",
    "output_hook",
    "skip",
    "layer_norm",
)


@dataclass(frozen=True, kw_only=True)
class _Described:
    trained_on: Mapping[str, str] = field(default_factory=dict)


def read_trained_on(checkpoint: Mapping[str, Any]) -> dict[str, str]:
    """What the SAE of a checkpoint was trained on, by name; empty if the checkpoint does not say it.

    Raises:
        RecordError: the entry holds something else than strings by name.
    """
    entries = {name: value for name, value in checkpoint.items() if name == "trained_on"}
    return dict(read_record(_Described, entries, "the checkpoint").trained_on)


def check_checkpoint(mine: Mapping[str, Any], saved: object) -> None:
    """Check that a checkpoint holds a dictionary of the same kind and size.

    Args:
        mine: hyperparameters of the dictionary that the checkpoint is loaded into.
        saved: hyperparameters in the checkpoint.

    Raises:
        ValueError: they differ (the message names the first difference), or `saved` does not hold values by name.
    """
    if not isinstance(saved, Mapping):
        raise RecordError(
            f"the hyperparameters in the checkpoint are a {type(saved).__name__}: take another checkpoint"
        )
    for name in _KIND_AND_SIZE:
        if name in saved and name in mine and saved[name] != mine[name]:
            raise ValueError(
                f"the checkpoint holds an SAE with {name}={saved[name]!r}, this one has {mine[name]!r}: "
                f"set {name}={saved[name]!r}, or use SparseAutoencoder.load_from_checkpoint(path)"
            )
