"""Convert states of version 1, in checkpoints and sidecars, to the present version."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def from_version_1(value: Any) -> Any:
    """Convert a state of version 1, or any part of one; values of the present version are returned unchanged.

    A position in the text had its document in an object of its own. Positions in a cache need no conversion: those of
    version 1 lack the version of the order.
    """
    if isinstance(value, Mapping):
        converted = {key: from_version_1(item) for key, item in value.items()}
        document = converted.get("document")
        if converted.keys() == {"document", "segment"} and isinstance(document, Mapping):
            reader = {"reader": document["state"]} if "state" in document else {}
            rest = {key: item for key, item in document.items() if key != "state"}
            return {**rest, **reader, "segment": converted["segment"]}
        return converted
    return [from_version_1(item) for item in value] if isinstance(value, tuple | list) else value
