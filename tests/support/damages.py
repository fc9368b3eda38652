"""Damage one or two files of a folder, as the seed of a random generator says: bits, sizes, mix-ups and JSON values."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deeplens_lightning.disk.json_text import signed

LARGE = 6 * 2**30
"""Bytes of a sparse file: more memory than reading may take."""


@dataclass(frozen=True, kw_only=True)
class Damage:
    """What was done to a folder.

    Attributes:
        words: the damage in words.
        forged: whether the file was given the digest of its new content, as only intent does.
        removed: whether a file is gone.
    """

    words: str
    forged: bool = False
    removed: bool = False


class Planted:
    """Makes a folder when it is unpickled without care."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def damage(folder: Path, other: Path, mark: Path, rng: random.Random, mix: bool = True) -> Damage:
    """Damage a folder.

    Args:
        folder: the folder.
        other: one with files of the same names, to copy from.
        mark: a folder that appears if code planted in a file is executed.
        rng: decides the damage.
        mix: whether whole files may take the place of others.
    """
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    path = rng.choice(files)
    texts = [path for path in files if path.suffix == ".json"]
    kinds = [_flip, _flip, _flip, _zero, _truncate, _extend, _remove, _remove, _large, _plant]
    if mix and rng.random() < 0.3:
        return _mix(files, other, rng)
    if texts and rng.random() < 0.4:
        return _edit(rng.choice(texts), rng)
    return rng.choice(kinds)(path, mark, rng)


def _flip(path: Path, mark: Path, rng: random.Random) -> Damage:
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content))
    content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return Damage(words=f"flip a bit of byte {place} of {path.name}")


def _zero(path: Path, mark: Path, rng: random.Random) -> Damage:
    content = bytearray(path.read_bytes())
    start, length = rng.randrange(len(content)), rng.choice([1, 16, 300, 4096])
    part = content[start : start + length]
    content[start : start + length] = bytes(len(part))
    path.write_bytes(content)
    return Damage(words=f"zero {len(part)} bytes from {start} of {path.name}")


def _truncate(path: Path, mark: Path, rng: random.Random) -> Damage:
    size = rng.choice([0, 1, rng.randrange(path.stat().st_size), path.stat().st_size - 1])
    os.truncate(path, size)
    return Damage(words=f"truncate {path.name} to {size}")


def _extend(path: Path, mark: Path, rng: random.Random) -> Damage:
    with path.open("ab") as file:
        added = file.write(rng.choice([b"\0", b"x" * 300, b"{}", path.read_bytes()]))
    return Damage(words=f"append {added} bytes to {path.name}")


def _remove(path: Path, mark: Path, rng: random.Random) -> Damage:
    path.unlink()
    kind = rng.choice(["nothing", "a folder", "a symlink loop", "a pipe"])
    if kind == "a folder":
        path.mkdir()
    elif kind == "a symlink loop":
        path.symlink_to(path.name)
    elif kind == "a pipe":
        os.mkfifo(path)
    return Damage(words=f"put {kind} in the place of {path.name}", removed=True)


def _large(path: Path, mark: Path, rng: random.Random) -> Damage:
    os.truncate(path, LARGE)
    return Damage(words=f"extend {path.name} to {LARGE} bytes without content")


def _plant(path: Path, mark: Path, rng: random.Random) -> Damage:
    torch.save({"rows": Planted(mark)} if rng.random() < 0.5 else Planted(mark), path)
    return Damage(words=f"plant code in {path.name}")


def _mix(files: list[Path], other: Path, rng: random.Random) -> Damage:
    path = rng.choice(files)
    alike = [each for each in files if each.suffix == path.suffix and each != path] or files
    second = rng.choice(alike)
    kind = rng.choice(["swap", "copy", "foreign", "add"])
    if kind == "swap":
        path.rename(path.with_suffix(".swapped"))
        second.rename(path)
        path.with_suffix(".swapped").rename(second)
        return Damage(words=f"swap {path.name} and {second.name}")
    if kind == "copy":
        shutil.copyfile(second, path)
        return Damage(words=f"copy {second.name} over {path.name}")
    if kind == "foreign":
        shutil.copyfile(other / path.name, path)
        return Damage(words=f"copy {path.name} from another cache")
    for suffix in (".pt", ".json"):
        shutil.copyfile(
            files[-1].with_name(f"rank00000-000000{suffix}"), path.with_name(f"rank00000-000009{suffix}")
        )
    return Damage(words="copy shard 0 and its sidecar to number 9")


def _edit(path: Path, rng: random.Random) -> Damage:
    """Change one value of a JSON file; every second time, give the file the digest of its new content."""
    if rng.random() < 0.05:
        path.write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
        return Damage(words=f"nest {path.name}")
    content = json.loads(path.read_text())
    place = rng.choice([*_places(content)])
    parent, key = content, place[-1]
    for step in place[:-1]:
        parent = parent[step]
    before = json.dumps(parent[key])
    how = rng.choice(["delete", "null", "value", "value", "twice", "type"])
    if how == "delete":
        del parent[key]
    elif how == "twice" and isinstance(parent, list):
        parent.insert(key, parent[key])
    elif how == "value":
        parent[key] = _other_value(parent[key], rng)
    else:
        parent[key] = (
            None
            if how == "null"
            else rng.choice([[], {}, "", 0, True, [1, [2]], {"x": 1}, 0.5, "7", 10**400])
        )
    forged = rng.random() < 0.5 and content.get("version") == 2
    path.write_text(json.dumps(signed(content) if forged else content, indent=2))
    return Damage(words=f"{how} {place} of {path.name}, was {before[:60]}, forged: {forged}", forged=forged)


def _other_value(value: Any, rng: random.Random) -> Any:
    if isinstance(value, bool | None):
        return not value
    if isinstance(value, int):
        return rng.choice([value + 1, value - 1, -value - 1, value * 10 + 3, 2**63, 10**30, value + 0.5])
    if isinstance(value, str) and value:
        place = rng.randrange(len(value))
        return value[:place] + rng.choice("aA0=/.\u0660") + value[place + 1 :]
    return rng.choice([1, "x", [], None])


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys that lead to each value in a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield (*at, key)
        yield from _places(item, (*at, key))
