"""Thousands of damaged caches: rows are as written, or one sentence says which file is damaged."""

from __future__ import annotations

import os
import random
import resource
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deeplens_lightning.shards import ShardError, ShardStream, ShardWriter, verify
from deeplens_lightning.shards.frame import read_frame
from tests.support.caches import WIDE, feed, make_rows, manifest, one_epoch
from tests.support.damages import Damage, damage

ROWS, SHARD_ROWS = 150, 50
KINDS = ("exact", "int8", "unfinished", "bare", "version 1")
V1 = Path(__file__).parents[1] / "fixtures" / "v1" / "caches" / "exact"


@dataclass(frozen=True)
class Content:
    """What is read from a cache: rows by hook point and provenance in order, and the documents that decide the split."""

    tensors: tuple[Tensor, ...]
    documents: tuple[int, ...]

    def begins_with(self, other: Content) -> bool:
        tensors = all(
            torch.equal(mine[: len(its)], its) for mine, its in zip(self.tensors, other.tensors, strict=True)
        )
        return tensors and self.documents[: len(other.documents)] == other.documents

    def equals(self, other: Content) -> bool:
        return self.begins_with(other) and other.begins_with(self)


def paths(folder: Path) -> list[Path] | Path:
    """What is given as `shards=`: bare tensors by name, so that a missing one is noticed."""
    return [folder / f"{number}.pt" for number in range(3)] if folder.parent.name == "bare" else folder


def read(folder: Path, checksums: bool) -> Content:
    stream = ShardStream(paths(folder), batch_size=64, shuffle="none", split="all", checksums=checksums)
    batches = list(one_epoch(stream))
    names = batches[0].rows
    tensors = [torch.cat([batch.rows[name] for batch in batches]) for name in names]
    runs = [(shard.document_hashes.tolist(), shard.document_rows.tolist()) for shard in stream.catalog.shards]
    documents = [
        hash_
        for hashes, rows in runs
        for hash_, count in zip(hashes, rows, strict=True)
        for _ in range(count)
    ]
    return Content((*tensors, torch.cat([batch.provenance for batch in batches])), tuple(documents))


def description(kind: str, name: str = "random"):
    return manifest(storage="int8" if kind == "int8" else "exact", model={"name": name})


def make(kind: str, folder: Path, name: str, seed: int) -> None:
    """A cache of one kind; with another name and seed, another one whose files have the same names and sizes."""
    rows, provenance = make_rows(ROWS, seed)
    if kind == "bare":
        folder.mkdir(parents=True)
        for number in range(3):
            part = slice(number * SHARD_ROWS, (number + 1) * SHARD_ROWS)
            torch.save(rows[WIDE][part].clone(), folder / f"{number}.pt")
    elif kind == "version 1":
        shutil.copytree(V1, folder)
    else:
        about = description(kind, name)
        with ShardWriter(folder, about, shard_bytes=SHARD_ROWS * about.row_bytes) as writer:
            feed(writer, rows, provenance, batch=20, stop=None if kind != "unfinished" else 110)
            if kind != "unfinished":
                writer.finish()


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """A folder with a cache, its content, and another cache, by kind."""
    made = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp("caches") / kind
        make(kind, folder / "whole", "random", seed=0)
        make(kind, folder / "other", "else", seed=1)
        made[kind] = folder / "whole", read(folder / "whole", checksums=True), folder / "other"
    return made


def inside_payloads(whole: Path, damaged: Path) -> bool:
    """Whether a folder differs from another one only in the numbers of its tensors."""
    for path in whole.glob("*"):
        copy = damaged / path.name
        if not copy.is_file() or copy.stat().st_size != path.stat().st_size:
            return False
        before, after = path.read_bytes(), copy.read_bytes()
        if before != after:  # both of a few kilobytes
            payloads = read_frame(path).payloads if path.suffix == ".pt" else ()
            changed = [place for place in range(len(before)) if before[place] != after[place]]
            if not all(any(at <= place < at + length for at, length in payloads) for place in changed):
                return False
    return True


def attempt(folder: Path, checksums: bool) -> Content | ShardError:
    try:
        return read(folder, checksums)
    except ShardError as error:
        return error


def is_right(got: Content | ShardError, want: Content, kind: str, done: Damage) -> bool:
    """Whether what was read is right: an error, or everything; without an index, everything up to a file that is gone."""
    if isinstance(got, ShardError) or got.equals(want):
        return True
    return kind == "unfinished" and done.removed and want.begins_with(got)


def check(kind: str, seed: int, caches, tmp_path: Path) -> str:
    """Damage a cache, read it, verify it and continue to write it; what came of it."""
    whole, want, other = caches[kind]
    folder, mark = tmp_path / kind / "acts", tmp_path / "executed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    done = damage(folder, other, mark, random.Random(f"{kind} {seed}"), mix=kind != "bare")
    checked, unchecked = attempt(folder, checksums=True), attempt(folder, checksums=False)
    report = verify(paths(folder))
    inside = inside_payloads(whole, folder)
    continued = kind == "bare" or go_on(kind, folder, want, done)
    assert not mark.exists(), f"{done} was executed"
    for error in (checked, unchecked):
        if isinstance(error, ShardError):
            assert str(folder) in str(error), f"{error} does not name the file"
    if done.forged or kind == "version 1":  # no raw error is all that can be promised
        return "forged or version 1"
    assert is_right(checked, want, kind, done), f"{done} is served with checksums"
    assert inside or is_right(unchecked, want, kind, done), f"{done} is served without checksums"
    same = all(is_right(got, want, kind, done) and isinstance(got, Content) for got in (checked, unchecked))
    assert report.problems or same, f"verify says that all is well after {done}"
    assert continued, f"{done} is continued to something else"
    return (
        "refused" if isinstance(unchecked, ShardError) else "found by checksums" if not same else "harmless"
    )


def go_on(kind: str, folder: Path, want: Content, done: Damage) -> bool:
    """Continue to write a cache; whether it then holds all rows, or is known not to."""
    about = description(kind)
    try:
        with ShardWriter(folder, about, shard_bytes=SHARD_ROWS * about.row_bytes) as writer:
            if done.forged:  # `resume.source` is the caller's, who may have to refuse it
                return True
            feed(writer, *make_rows(ROWS), batch=20)
            writer.finish()
    except ShardError:
        return True
    except OSError as error:  # a folder stands where a file is to be written
        return any(path.is_dir() for path in folder.iterdir()) and error.filename is not None
    if verify(folder).problems:
        return True
    got = read(folder, checksums=True)
    return len(got.tensors[0]) == ROWS and got.begins_with(want)


def check_many(kind: str, seeds: range, caches, tmp_path: Path) -> Counter:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = Counter(check(kind, seed, caches, tmp_path) for seed in seeds)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 10**9, f"memory grew by {grown:,} bytes"
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_cache_is_read_as_it_was_written_or_refused(kind, caches, tmp_path):
    check_many(kind, range(24), caches, tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", KINDS)
def test_10_000_damaged_caches_are_read_as_they_were_written_or_refused(kind, caches, tmp_path):
    """The environment variable DAMAGES sets another number."""
    each = int(os.environ.get("DAMAGES", 10_000)) // len(KINDS)
    print(kind, check_many(kind, range(1000, 1000 + each), caches, tmp_path))
