"""Reject checkpoints that hold another kind or size of dictionary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


def check_checkpoint(mine: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Check that a checkpoint holds a dictionary of the same kind and size.

    Args:
        mine: hyperparameters of the dictionary that the checkpoint is loaded into.
        saved: hyperparameters in the checkpoint.

    Raises:
        ValueError: they differ; the message names the first difference.
    """
    for name in _KIND_AND_SIZE:
        if name in saved and name in mine and saved[name] != mine[name]:
            raise ValueError(
                f"the checkpoint holds an SAE with {name}={saved[name]!r}, this one has {mine[name]!r}: "
                f"set {name}={saved[name]!r}, or use SparseAutoencoder.load_from_checkpoint(path)"
            )
