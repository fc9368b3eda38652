"""Shards that are truncated, overwritten, replaced or deleted while a stream has them mapped."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deeplens_lightning.shards import DamagedShardError, ShardStream
from deeplens_lightning.shards.changes import EVERY
from deeplens_lightning.shards.names import shard_name
from deeplens_lightning.types import Served
from tests.support.caches import WIDE, manifest, one_epoch, write_cache

BATCH = 20
ROWS = 10 * EVERY * BATCH


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_cache(tmp_path / "acts", n=ROWS, shard_rows=ROWS // 4)
    return tmp_path / "acts"


def overwrite(path: Path) -> None:
    with path.open("rb+") as file:
        file.seek(10_000)
        file.write(bytes(5000))


def truncate(path: Path) -> None:
    """The end of the file only, whose page stays mapped: reading behind it would be SIGBUS."""
    os.truncate(path, path.stat().st_size - 1)


def extend(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def restore_time(path: Path) -> None:
    """As `rsync --inplace --times` and `cp --preserve` leave it: only the size shows the change."""
    stat = path.stat()
    extend(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("shuffle", ["global", "window"])
@pytest.mark.parametrize("change", [overwrite, truncate, extend, restore_time])
def test_a_change_in_place_stops_the_stream_within_some_batches(
    folder: Path, shuffle: str, change: Callable[[Path], None]
) -> None:
    options: dict[str, Any] = {"shuffle": shuffle, "window_bytes": 10**9 if shuffle == "window" else None}
    stream = ShardStream(folder, batch_size=BATCH, **options)
    batches = one_epoch(stream)
    for _ in range(3):
        next(batches)
    change(folder / shard_name(0, 2))
    served: list[Served] = []
    with pytest.raises(DamagedShardError, match=r"000002\.pt was changed while it was in use") as error:
        served.extend(batches)
    assert len(served) < EVERY
    assert str(folder) in str(error.value)
    assert "deeplens-lightning verify" in str(error.value)


def test_a_change_is_noticed_before_the_next_window(tmp_path: Path) -> None:
    steps = EVERY // 4
    write_cache(tmp_path, n=8 * steps * BATCH, shard_rows=steps * BATCH)
    window = steps * BATCH * manifest().row_bytes
    stream = ShardStream(tmp_path, batch_size=BATCH, shuffle="window", window_bytes=window)
    batches = one_epoch(stream)
    next(batches)
    [number] = stream._gatherer._open
    overwrite(tmp_path / stream.catalog.shards[number].file)
    served: list[Served] = []
    with pytest.raises(DamagedShardError, match="was changed while it was in use"):
        served.extend(batches)
    assert len(served) == steps - 1
    stream.close()


def test_a_deleted_or_replaced_file_of_an_equal_time_does_no_harm(folder: Path) -> None:
    options: dict[str, Any] = {"batch_size": BATCH, "shuffle": "global"}
    expected = [batch.rows[WIDE] for batch in one_epoch(ShardStream(folder, **options))]
    batches = one_epoch(ShardStream(folder, **options))
    found = [next(batches).rows[WIDE]]
    (folder / shard_name(0, 0)).unlink()
    other, stat = folder / "other", (folder / shard_name(0, 1)).stat()
    other.write_bytes(bytes(stat.st_size))
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(folder / shard_name(0, 1))
    found += [batch.rows[WIDE] for batch in batches]
    assert torch.equal(torch.cat(found), torch.cat(expected))


def test_a_copy_of_a_remote_shard_that_is_overwritten_is_noticed(tmp_path: Path) -> None:
    url = f"memory://{uuid.uuid4().hex}/acts"
    write_cache(url, n=ROWS, shard_rows=ROWS // 4)
    stream = ShardStream(url, batch_size=BATCH, shuffle="global", cache_dir=tmp_path)
    batches = one_epoch(stream)
    next(batches)
    for path in tmp_path.rglob("*.pt"):
        overwrite(path)
    with pytest.raises(DamagedShardError, match="was changed while it was in use"):
        list(batches)
    stream.close()
