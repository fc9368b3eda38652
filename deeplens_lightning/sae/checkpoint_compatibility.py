"""Reject checkpoints that hold another kind or size of dictionary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SIZES = (
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
    """Raise ValueError naming the difference when a checkpoint holds another kind or size of dictionary."""
    for name in SIZES:
        if name in saved and name in mine and saved[name] != mine[name]:
            raise ValueError(
                f"the checkpoint holds an SAE with {name}={saved[name]!r}, this one has {mine[name]!r}: "
                "build it with the checkpoint's settings, or use SparseAutoencoder.load_from_checkpoint(path)"
            )
