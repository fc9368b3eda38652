"""The order of the steps that write a cache survives kills and a loss of power, on a disk and in an object store."""

from __future__ import annotations

import os
import shutil
from functools import partial
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch

from deeplens_lightning.shards import ShardStream, ShardWriter, verify
from deeplens_lightning.shards.names import INDEX, MANIFEST, done_name, shard_name, sidecar_name
from deeplens_lightning.types import Served
from tests.support.caches import feed, make_rows, manifest, read_back, write_cache
from tests.support.kills import killed, steps_of
from tests.support.storage_servers import s3_server

ROWS, SHARD_ROWS = 900, 200
SHARDS = [shard_name(0, number) for number in range(5)]


def write(where: str) -> None:
    """Start or continue a cache of five shards."""
    with ShardWriter(where, manifest(), shard_bytes=SHARD_ROWS * manifest().row_bytes) as writer:
        if not (writer.finished or writer.complete):
            feed(writer, *make_rows(ROWS))
        writer.finish()


def test_a_file_is_on_the_disk_before_its_name_and_its_name_before_the_next_one(tmp_path: Path) -> None:
    steps = [(step, Path(path).name) for step, path in steps_of(partial(write, str(tmp_path / "acts")))]
    files = [each for shard in SHARDS for each in (shard, sidecar_name(shard))]
    assert [name for step, name in steps if step == "replace"] == [MANIFEST, *files, done_name(0), INDEX]
    assert steps[:2] == [("make folder", "acts"), ("sync folder", tmp_path.name)]
    for number, (step, name) in enumerate(steps):
        if step == "replace":
            around = [each for each, _ in steps[number - 4 : number + 2]]
            assert around == ["create", "write", "inside write", "sync", "replace", "sync folder"], name
            assert steps[number + 1][1] == "acts"


def broken(folder: Path) -> None:
    """A complete cache of five shards whose second one is missing."""
    write_cache(folder, n=ROWS, shard_rows=SHARD_ROWS)
    (folder / SHARDS[1]).unlink()


def test_deleting_the_rest_of_a_cache_leaves_the_beginning_of_a_cache_at_every_step(
    tmp_path: Path, processes: ForkServerContext
) -> None:
    whole = tmp_path / "whole"
    write_cache(whole, n=ROWS, shard_rows=SHARD_ROWS)
    counted = tmp_path / "counted"
    broken(counted)
    steps = steps_of(partial(write, str(counted)))
    removed = [number for number, (step, _) in enumerate(steps) if step == "remove"]
    gone = [INDEX, done_name(0), *(x for shard in SHARDS[:1:-1] for x in (sidecar_name(shard), shard))]
    assert [Path(steps[number][1]).name for number in removed] == [*gone, sidecar_name(SHARDS[1])]
    for number in removed:
        folder = tmp_path / str(number)
        broken(folder)
        killed(number + 1, partial(write, str(folder)), processes)
        left = {path.name for path in folder.glob("rank*")}
        assert INDEX not in {path.name for path in folder.iterdir()}
        numbers = [n for n, shard in enumerate(SHARDS) if sidecar_name(shard) in left]
        assert numbers == list(range(len(numbers)))
        assert all(SHARDS[n] in left for n in numbers if n != 1)
        write(str(folder))
        assert verify(folder).problems == []
        assert_same(folder, whole)
        shutil.rmtree(folder)


def assert_same(folder: Path, whole: Path) -> None:
    (rows, provenance), (expected, where) = read_back(folder), read_back(whole)
    assert torch.equal(provenance, where)
    assert all(torch.equal(rows[name], expected[name]) for name in expected)


def write_to_s3(where: str, environment: dict[str, str]) -> None:
    """`write`, in a process that does not have the environment of this one."""
    os.environ |= environment
    write(where)


@pytest.mark.slow
def test_a_writer_to_an_object_store_killed_before_any_upload_is_completed(
    tmp_path: Path, processes: ForkServerContext
) -> None:
    write_cache(tmp_path / "whole", n=ROWS, shard_rows=SHARD_ROWS)
    with s3_server():
        environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        steps = [step for step, _ in steps_of(partial(write, "s3://bucket/counted/acts"))]
        uploads = [number for number, step in enumerate(steps) if step == "upload"]
        assert len(uploads) == 1 + 2 * len(SHARDS) + 2
        for at in [*uploads, uploads[-1] + 1]:  # other steps are in a temporary folder of this machine
            url = f"s3://bucket/{at}/acts"
            killed(at, partial(write_to_s3, url, environment), processes)
            write(url)
            assert verify(url).problems == []
            [found], [expected] = (served(where) for where in (url, tmp_path / "whole"))
            assert torch.equal(found.provenance, expected.provenance)
            assert all(torch.equal(found.rows[name], expected.rows[name]) for name in expected.rows)


def served(where: str | Path) -> list[Served]:
    """All rows of a cache as one batch."""
    stream = ShardStream(where, batch_size=ROWS, shuffle="none")
    batches = list(stream.batches(stream.start(), 0))
    stream.close()
    return batches
