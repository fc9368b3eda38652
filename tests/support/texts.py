"""English texts for tests: pieces of the Python manual, the same in every run and on every machine."""

from __future__ import annotations

import json
import pydoc_data.topics
from collections.abc import Iterable
from pathlib import Path


def texts(count: int, longest: int = 500) -> list[str]:
    """`count` documents of 10 to `longest` characters; one is empty and one is blank."""
    manual = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    found, start = [], 0
    for i in range(count):
        length = 10 + (i * 7919) % longest
        found.append(manual[start : start + length])
        start += length
    assert start < len(manual), f"the manual has {len(manual)} characters, which is too short for these texts"
    return [*found[:3], "", *found[3:7], " \n\t", *found[7:]][:count]


def write_jsonl(path: Path, documents: Iterable[str]) -> Path:
    """Write a `.jsonl` file with one document a line, in the column "text" beside a column "url"."""
    path.write_text("".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in documents))
    return path
