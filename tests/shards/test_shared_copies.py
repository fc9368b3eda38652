"""Local copies of remote shards that several runs, or several streams of one run, share."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch

from deeplens_lightning import ActivationDataModule
from deeplens_lightning.options import CacheOptions
from deeplens_lightning.shards import ShardStream
from deeplens_lightning.shards.local_copies import LocalCopies
from deeplens_lightning.shards.names import shard_name
from deeplens_lightning.shards.remote import RemoteFolder
from tests.support.caches import NARROW, WIDE, manifest, on_disk, one_epoch, write_cache
from tests.support.storage_servers import faulty_proxy, http_server

SHARD_ROWS = 300
SHARD = SHARD_ROWS * manifest().row_bytes + 4000
"""More bytes than a shard file has."""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The URL of a cache of ten shards, and the same cache on disk."""
    write_cache(tmp_path / "served" / "acts", n=10 * SHARD_ROWS, shard_rows=SHARD_ROWS)
    with http_server(tmp_path / "served") as url:
        yield f"{url}/acts", tmp_path / "served" / "acts"


def read(where: str, out: Path, **options: Any) -> None:
    """Save the rows of two epochs."""
    stream = ShardStream(where, batch_size=64, **options)
    rows = [batch.rows[WIDE] for epoch in range(2) for batch in one_epoch(stream, epoch)]
    torch.save(torch.cat(rows), out)
    stream.close()


@pytest.mark.slow
def test_two_runs_share_room_for_two_shards(
    served: tuple[str, Path], tmp_path: Path, processes: ForkServerContext
) -> None:
    url, folder = served
    bound, copies = 2 * SHARD, tmp_path / "copies"
    options = {"shuffle": "window", "window_bytes": bound // 3}
    runs = [
        processes.Process(
            target=read,
            args=(url, tmp_path / f"rows-{seed}.pt"),
            kwargs={"seed": seed, "cache_dir": copies, "cache_bytes": bound, **options},
        )
        for seed in (1, 2)
    ]
    for run in runs:
        run.start()
    most = 0
    while any(run.is_alive() for run in runs):
        most = max(most, on_disk(copies))
        for run in runs:
            run.join(0.002)
    assert [run.exitcode for run in runs] == [0, 0]
    assert SHARD_ROWS * manifest().row_bytes < most <= bound
    assert on_disk(copies) <= bound
    for seed in (1, 2):
        read(str(folder), tmp_path / "expected.pt", seed=seed, **options)
        assert torch.equal(torch.load(tmp_path / f"rows-{seed}.pt"), torch.load(tmp_path / "expected.pt"))


def test_validating_in_mid_epoch_deletes_no_copy_that_training_needs(
    served: tuple[str, Path], tmp_path: Path
) -> None:
    def rows(where: str, cache: CacheOptions) -> torch.Tensor:
        """The training rows of an epoch in ascending order, with validation rows between them."""
        dm = ActivationDataModule(
            shards=where,
            layer=0,
            hook="mlp_out",
            batch_size=64,
            val_fraction=0.3,
            val_rows=500,
            cache_options=cache,
        )
        dm.setup("fit")
        train, held_out = [], 0
        for batch in dm.train_dataloader():
            train.append(batch)
            if len(train) % 5 == 2:
                held_out += sum(map(len, dm.val_dataloader()))
        dm.teardown("fit")
        assert held_out
        return torch.cat(train)[:, 0].sort().values

    url, folder = served
    bounded = CacheOptions(shuffle="window", dir=str(tmp_path / "copies"), bytes=2 * SHARD)
    assert torch.equal(rows(url, bounded), rows(str(folder), CacheOptions()))
    assert on_disk(tmp_path / "copies") <= 2 * SHARD


@pytest.mark.slow
def test_two_streams_of_one_process_share_a_folder(served: tuple[str, Path], tmp_path: Path) -> None:
    url, folder = served
    options: dict[str, Any] = {"batch_size": 50, "shuffle": "window", "window_bytes": SHARD}
    shared = {"cache_dir": tmp_path / "copies", "cache_bytes": 2 * SHARD}
    streams = [ShardStream(url, seed=seed, **shared, **options) for seed in (1, 2)]
    alone = [ShardStream(folder, seed=seed, **options) for seed in (1, 2)]
    for batches in zip(*map(one_epoch, [*streams, *alone]), strict=True):
        for one, other in zip(batches[:2], batches[2:], strict=True):
            assert torch.equal(one.rows[NARROW], other.rows[NARROW])
        assert on_disk(tmp_path / "copies") <= 2 * SHARD
    for stream in streams:
        stream.close()


@pytest.mark.slow
def test_ranks_share_one_bound(served: tuple[str, Path], tmp_path: Path) -> None:
    url, _ = served
    ranks = [
        ShardStream(url, batch_size=50, rank=rank, world_size=2, shuffle="window", window_bytes=SHARD,
                    cache_dir=tmp_path / "copies", cache_bytes=4 * SHARD)
        for rank in (0, 1)
    ]  # fmt: skip
    for _ in zip(*map(one_epoch, ranks), strict=True):
        assert on_disk(tmp_path / "copies") <= 4 * SHARD
    for rank in ranks:
        rank.close()


def test_a_mapped_copy_that_another_run_deletes_stays_readable(
    served: tuple[str, Path], tmp_path: Path
) -> None:
    url, folder = served
    options: dict[str, Any] = {"batch_size": 50, "shuffle": "global", "seed": 4}
    stream = ShardStream(url, cache_dir=tmp_path / "copies", **options)
    batches = one_epoch(stream)
    found = [next(batches)]
    for path in (tmp_path / "copies").rglob("*.pt"):
        path.unlink()
    found += batches
    stream.close()
    expected = list(one_epoch(ShardStream(folder, **options)))
    assert all(torch.equal(a.rows[WIDE], b.rows[WIDE]) for a, b in zip(found, expected, strict=True))


def hang(url: str, temporary: Path, copies: Path | None) -> None:
    """Fetch shards, with temporary folders in `temporary`."""
    tempfile.tempdir = str(temporary)
    read(url, temporary / "rows.pt", shuffle="window", window_bytes=SHARD, cache_dir=copies, timeout=3600)


@pytest.mark.slow
def test_what_a_killed_run_left_is_deleted_and_what_a_living_one_has_is_kept(
    served: tuple[str, Path], tmp_path: Path, processes: ForkServerContext
) -> None:
    url, _ = served
    temporary, copies = tmp_path / "tmp", tmp_path / "copies"
    temporary.mkdir()

    def unfinished() -> list[Path]:
        return [*temporary.rglob(".writing-*.pt-*"), *copies.rglob(".writing-*.pt-*")]

    with faulty_proxy(url) as proxy:
        proxy.fault = lambda method, path, _: "stuck" if path.endswith(".pt") else None
        runs = [
            processes.Process(target=hang, args=(f"{proxy.url}/acts", temporary, place))
            for place in (None, copies)
        ]
        living = processes.Process(target=hang, args=(f"{proxy.url}/acts", temporary, None))
        for run in (*runs, living):
            run.start()
        while len(unfinished()) < 6:  # two threads of each
            assert all(run.is_alive() for run in (*runs, living))
            living.join(0.01)
        for run in runs:
            os.kill(run.pid or 0, signal.SIGKILL)
            run.join()
        before = set(temporary.glob("deeplens-lightning-*"))
        after = processes.Process(target=hang, args=(url, temporary, copies))
        after.start()
        after.join()
        assert after.exitcode == 0
        kept = set(temporary.glob("deeplens-lightning-*"))
        assert kept < before
        assert len(unfinished()) == 2
        assert all(path.is_relative_to(temporary) for path in unfinished())
        assert living.is_alive()
        living.kill()
        living.join()


def test_the_least_recently_used_copy_goes_first(served: tuple[str, Path], tmp_path: Path) -> None:
    url, _ = served
    folder = RemoteFolder(url)
    sizes, names = folder.sizes(), [shard_name(0, number) for number in range(3)]
    one, other = (LocalCopies(tmp_path / "copies", max_bytes=2 * SHARD) for _ in range(2))
    for copies, name in ((one, names[0]), (other, names[1]), (one, names[0]), (other, names[2])):
        with copies.opened(folder, name, sizes[name], None):
            pass
    assert {path.name for path in (tmp_path / "copies").rglob("*.pt")} == {names[0], names[2]}
    one.close()
    other.close()
