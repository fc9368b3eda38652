"""The data module's part of a checkpoint: its shape, and whether a run may go on from it.

Primitives and tensors only, so that it loads with `weights_only=True`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

STATE_VERSION = 1

Table = list[tuple[dict[str, Any], int, int]]
"""Of every rank: a position, and the batches and rows served since."""


def check_version(state: Mapping[str, Any]) -> None:
    """Refuse a state that this version does not know.

    Raises:
        ValueError: with what to do.
    """
    if state.get("version") != STATE_VERSION:
        raise ValueError(
            f"the checkpoint's data state has version {state.get('version')}, this release reads {STATE_VERSION}: "
            "go on with the release that wrote it, or start anew with SparseAutoencoder.load_from_checkpoint"
        )


def differences(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What is not the same, one sentence each."""
    return [
        f"{key}: {saved.get(key, '(nothing)')} in the checkpoint, {now.get(key, '(nothing)')} now"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key)
    ]


def check_fingerprint(saved: Mapping[str, str], now: Mapping[str, str], unused: Collection[str] = ()) -> None:
    """Refuse to go on with other data than before.

    Args:
        saved: of the checkpoint.
        now: of this run.
        unused: what may differ all the same.

    Raises:
        ValueError: naming each difference.
    """
    found = differences(
        *({key: value for key, value in each.items() if key not in unused} for each in (saved, now))
    )
    if found:
        raise ValueError(
            "this checkpoint was taken on other data; going on would not continue it.\n  "
            + "\n  ".join(found)
            + "\nUse the same configuration, or give resume_anyway=True to go on at the same place of the new data"
        )


def served_table(position: Mapping[str, Any]) -> Table:
    """How far each rank had come when the checkpoint was taken, from `ActivationLoader.position`."""
    since, batch_size = position["since"], position["batch_size"]
    return [
        (
            rank["position"],
            rank["step"] + since,
            rank["step"] * batch_size + min(since * batch_size, rank["rows"]),
        )
        for rank in position["ranks"]
    ]
