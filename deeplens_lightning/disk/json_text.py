"""Parse and write JSON objects whose content is protected by a digest.

In: bytes of a file. Out: a dict. A file that is too large, not JSON, nested too deeply or altered is an error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from deeplens_lightning.disk.records import RecordError

LIMIT = 64 * 2**20
"""Largest size in bytes of a JSON file that is read: parsing takes some ten times as much memory."""
DIGEST = "digest"
"""Key of the SHA-256 of the rest of the object."""


def parse_object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        RecordError: the data are too large, not JSON, nested too deeply, hold NaN or infinity, or are not an object.
    """
    if len(data) > LIMIT:
        raise RecordError(f"it has {len(data):,} bytes, more than the {LIMIT:,} bytes that are read")
    try:
        content = json.loads(data, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecordError:
        raise
    except RecursionError as error:
        raise RecordError("it is nested too deeply") from error
    except ValueError as error:  # JSON or its encoding, or an integer of too many digits
        raise RecordError(f"it is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise RecordError("it is not a JSON object")
    return content


def digest_of(content: Mapping[str, Any]) -> str:
    """SHA-256 of JSON values in hexadecimal, without an entry `digest`, whatever the order of keys and the layout."""
    rest = {key: value for key, value in content.items() if key != DIGEST}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def signed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The same values and, under `digest`, their SHA-256. It finds accidents; it does not stop an attacker."""
    return {**content, DIGEST: digest_of(content)}


def check_digest(content: Mapping[str, Any]) -> None:
    """Compare an object with its digest.

    Raises:
        RecordError: there is no digest, or the content was altered.
    """
    if content.get(DIGEST) != digest_of(content):
        raise RecordError("it is altered: its content does not have the digest that it was written with")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise RecordError("it holds a key twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise RecordError(f"it holds {name}, which is not JSON")
