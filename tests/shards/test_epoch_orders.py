"""The order of rows depends on the seed and the epoch, and not on how the rows are divided into shards."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deeplens_lightning.datamodule import ActivationDataModule
from deeplens_lightning.options import CacheOptions
from deeplens_lightning.shards import ShardStream, ShardWriter
from deeplens_lightning.shards.catalog import open_catalog
from deeplens_lightning.shards.epoch_orders import stretches
from deeplens_lightning.shards.order import WindowOrder
from tests.stream.small_stream import TEXTS, small_stream
from tests.support.caches import make_rows, manifest
from tests.support.recorder import assert_same, take

ROWS = 1200
SHARDS = (1, 17, 60)
SHUFFLES: dict[str, dict[str, Any]] = {
    "global": {"shuffle": "global"},
    "window": {"shuffle": "window", "window_bytes": 20_000},
    "none": {"shuffle": "none"},
}


def write_divided(folder: Path, ends: set[int], writers: int = 1) -> None:
    """Write `make_rows(ROWS)` and end a shard at some rows, as checkpoints do."""
    rows, provenance = make_rows(ROWS)
    share = ROWS // writers
    for rank in range(writers):
        with ShardWriter(folder, manifest(world_size=writers), rank=rank) as writer:
            first = rank * share
            for end in sorted({*(end for end in ends if first < end < first + share), first + share}):
                writer.append(
                    {name: value[first:end] for name, value in rows.items()},
                    provenance[first:end],
                    source={"row": first},
                    first_row=first - rank * share,
                )
                writer.sync()
                first = end
            writer.finish()


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same rows in 1, 17 and 60 shards of random lengths."""
    folder, rng = tmp_path_factory.mktemp("divided"), random.Random(4)
    for count in SHARDS:
        write_divided(folder / str(count), set(rng.sample(range(1, ROWS), count - 1)))
        assert len(list((folder / str(count)).glob("*.pt"))) == count
    return [folder / str(count) for count in SHARDS]


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_batches_do_not_depend_on_the_number_of_shards(caches: list[Path], shuffle: str, ranks: int) -> None:
    for batch_size in (24, 130, 700):
        for rank in range(ranks):
            served = []
            for cache in caches:
                stream = ShardStream(
                    cache,
                    batch_size=batch_size,
                    rank=rank,
                    world_size=ranks,
                    val_fraction=0.2,
                    **SHUFFLES[shuffle],
                )
                position = replace(stream.start(1), stretch_rows=90)
                served.append([(each.rows, each.provenance) for each in stream.batches(position, 0)])
                stream.close()
            for other in served[1:]:
                assert_same(other, served[0])


def test_batches_do_not_depend_on_the_shards_of_several_writers(tmp_path: Path) -> None:
    served = []
    for number, ends in enumerate([set(), {1, 50, 599, 601, 900}, set(range(10, ROWS, 23))]):
        write_divided(tmp_path / str(number), ends, writers=2)
        for shuffle in SHUFFLES.values():
            stream = ShardStream(tmp_path / str(number), batch_size=70, **shuffle)
            position = replace(stream.start(0), stretch_rows=100)
            served.append([(each.rows, each.provenance) for each in stream.batches(position, 0)])
    for number in range(3, 9):
        assert_same(served[number], served[number % 3])


def test_statistics_and_validation_rows_do_not_depend_on_the_number_of_shards(caches: list[Path]) -> None:
    found = []
    for cache in caches:
        dm = ActivationDataModule(
            shards=str(cache),
            batch_size=64,
            val_fraction=0.3,
            val_rows=150,
            normalize="zscore",
            cache_options=CacheOptions(shuffle="global"),
        )
        dm.setup("fit")
        scalings = dm.scaling
        assert isinstance(scalings, dict)
        batches = [torch.cat(list(batch.values()), 1) for batch in dm.val_dataloader()]
        found.append((scalings, torch.cat(batches)))
        dm.teardown("fit")
    for scalings, rows in found[1:]:
        assert torch.equal(rows, found[0][1])
        for name, scaling in scalings.items():
            assert torch.equal(scaling.shift, found[0][0][name].shift)
            assert torch.equal(scaling.scale, found[0][0][name].scale)


@pytest.mark.slow
@pytest.mark.parametrize("shuffle", ["global", "window"])
def test_a_run_that_writes_a_cache_does_not_depend_on_its_checkpoints(
    tiny: Callable[[str], str], tmp_path: Path, shuffle: Any
) -> None:
    rng, runs, batches = random.Random(0), [], 0
    for checkpoints in (0, 16, 59):
        folder = tmp_path / str(checkpoints)
        data = small_stream(
            tiny("llama"),
            dataset=TEXTS[:25],
            val_rows=40,
            write_shards=str(folder),
            batch_size=32,
            buffer_size=64,
            inference_batch_size=1,
            cache_options=CacheOptions(shuffle=shuffle),
        )
        data.setup("fit")
        steps = set(rng.sample(range(1, batches + 5), checkpoints)) if batches else set()
        step = 0
        for _ in range(2):
            for _batch in data.train_dataloader():
                step += 1
                if step in steps:
                    data.state_dict()
            batches = batches or step // 2
        runs.append(take(data, 10))
        data.teardown("fit")
    assert len(list((tmp_path / "0").glob("*.pt"))) == 1
    assert len(list((tmp_path / "59").glob("*.pt"))) > 16
    for run in runs[1:]:
        assert_same(run, runs[0])


def test_the_shards_of_a_window_are_those_that_hold_its_rows() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        counts = rng.integers(0, 5, rng.integers(1, 40)) * rng.integers(1, 20)
        total = int(counts.sum())
        if not total:
            continue
        firsts = np.sort(np.concatenate([[0, total], rng.integers(0, total + 1, 20)]))
        order = WindowOrder(counts, np.full(len(counts), 10), 30, 0, 0, firsts)
        ordinals = order[np.arange(total)]
        assert sorted(ordinals.tolist()) == list(range(total))
        windows: dict[int, set[int]] = {}
        shards = np.searchsorted(firsts, ordinals, "right") - 1
        near = [order.shards(place) for place in range(total)]
        starts = [place for place in range(total) if place == 0 or near[place] != near[place - 1]]
        for first, end in zip(starts, [*starts[1:], total], strict=True):
            windows[first] = set(shards[first:end].tolist())
            assert set(near[first][0]) >= windows[first]
            if end < total:
                assert near[first][1] == near[end][0]
        assert near[-1][1] == []
        assert {number for here, _ in near for number in here} == set(shards.tolist())


def test_stretches_begin_anew_with_each_rank_and_each_bare_tensor(tmp_path: Path) -> None:
    write_divided(tmp_path / "cache", {100, 300, 700}, writers=2)
    starts, sizes = stretches(open_catalog(tmp_path / "cache"), 400)
    assert starts.tolist() == [0, 400, 600, 1000, 1200]
    assert sizes.tolist() == [rows * manifest().row_bytes for rows in (400, 200, 400, 200)]
    (tmp_path / "bare").mkdir()
    for number, rows in enumerate((30, 50)):
        torch.save(torch.ones(rows, 4), tmp_path / "bare" / f"{number}.pt")
    catalog = open_catalog(tmp_path / "bare")
    starts, sizes = stretches(catalog, 50)
    assert starts.tolist() == [0, 30, 80]
    assert sizes.tolist() == [shard.nbytes for shard in catalog.shards]


@pytest.mark.parametrize(
    ("changes", "step", "message"),
    [
        ({"start": ROWS + 1}, 0, "1,201 rows and 0 batches into an epoch, which has 1,200 rows here"),
        ({"start": 600}, 7, "600 rows and 7 batches into an epoch"),
    ],
)
def test_a_position_beyond_the_epoch_is_refused(
    caches: list[Path], changes: dict[str, int], step: int, message: str
) -> None:
    stream = ShardStream(caches[0], batch_size=100)
    with pytest.raises(ValueError, match=message):
        next(stream.batches(replace(stream.start(), **changes), step))
