"""`ShardStream`: every row once an epoch, in any shuffle, on any number of ranks, resumed from any batch."""

import hashlib
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deeplens_lightning.shards import Manifest, Rows, ShardError, ShardStream, ShardWriter, heldout
from deeplens_lightning.shards.joined import JoinedRows
from deeplens_lightning.shards.shard_steps import ShardSteps
from deeplens_lightning.types import LivePosition, RankProgress, ShardPosition
from tests.support.caches import NARROW, WIDE, make_rows, one_epoch, write_cache

N = 3000


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    write_cache(folder, n=N, shard_rows=700)
    return folder


def assert_equal(one, other):
    assert torch.equal(one.provenance, other.provenance)
    assert all(torch.equal(one.rows[name], other.rows[name]) for name in one.rows)
    assert (one.certain, one.step, one.position) == (other.certain, other.step, other.position)


def rows_of(served):
    """Row numbers of a batch, from its provenance."""
    return (served.provenance[:, 1] * 37 + served.provenance[:, 2]).tolist()


SHUFFLES = [{"shuffle": "global"}, {"shuffle": "window", "window_bytes": 200_000}, {"shuffle": "none"}]


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("batch_size", [1, 64, 1000, 5000])
def test_an_epoch_serves_every_row_once_with_its_provenance(cache, shuffle, batch_size):
    rows, provenance = make_rows(N)
    batches = list(one_epoch(ShardStream(cache, batch_size=batch_size, **shuffle)))
    served = [row for batch in batches for row in rows_of(batch)]
    assert sorted(served) == list(range(N))
    assert (served == list(range(N))) == (shuffle["shuffle"] == "none")
    for batch in batches[:20]:
        index = torch.tensor(rows_of(batch))
        assert torch.equal(batch.provenance, provenance[index])
        assert torch.equal(batch.rows[WIDE], rows[WIDE][index])
        assert torch.equal(batch.rows[NARROW], rows[NARROW][index])
    assert [batch.certain for batch in batches] == list(range(len(batches), 0, -1))


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch_size=st.integers(1, 400),
    seed=st.integers(0, 2**40),
    world_size=st.integers(1, 5),
    epoch=st.integers(0, 3),
    shuffle=st.sampled_from(SHUFFLES),
    data=st.data(),
)
def test_resuming_anywhere_continues_bit_for_bit_on_every_rank(
    cache, batch_size, seed, world_size, epoch, shuffle, data
):
    together = []
    for rank in range(world_size):
        stream = ShardStream(
            cache,
            batch_size=batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            val_fraction=0.2,
            **shuffle,
        )
        batches = list(stream.batches(stream.start(epoch), 0))
        assert len(batches) == stream.steps()
        together.append([row for batch in batches for row in rows_of(batch)])
        stop = data.draw(st.integers(1, len(batches)))
        stopped = batches[stop - 1]
        again = ShardStream(
            cache,
            batch_size=batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            val_fraction=0.2,
            shuffle="auto",
        )
        resumed = list(again.batches(stopped.position, stopped.step))
        assert len(resumed) == len(batches) - stop
        for one, other in zip(resumed, batches[stop:], strict=True):
            assert_equal(one, other)
    served = [row for rank in together for row in rank]
    assert len(set(map(len, together))) == 1
    assert len(set(served)) == len(served) == stream.rows - stream.left_out()
    assert stream.left_out() < world_size


def test_rows_beyond_the_agreed_batches_of_an_epoch_are_counted(cache):
    stream = ShardStream(cache, batch_size=500)
    assert stream.dropped(stream.start(3), 4) == N - 2000
    assert stream.dropped(stream.start(3), 7) == 0


def test_steps_can_be_read_in_any_order(cache):
    stream = ShardStream(cache, batch_size=400, seed=5)
    [*batches] = one_epoch(stream)
    position = stream.start()
    steps = ShardSteps(
        position,
        plan=stream._plan(position),
        order=stream._orders.order(position),
        gatherer=stream._gatherer,
        rank=0,
    )
    assert len(steps) == len(batches)
    for step in (3, 0, 7, 5):
        assert_equal(steps[step], batches[step])
    for step in (-1, 8):
        with pytest.raises(IndexError, match=f"step {step} is not between 0 and 7"):
            steps[step]


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_provenance_is_gathered_when_asked_for_and_at_any_time_later(cache, shuffle, monkeypatch):
    alone = [batch.provenance for batch in one_epoch(ShardStream(cache, batch_size=400, **shuffle))]
    gathered = []

    def take(self, numbers, rows, out, original=JoinedRows.take):
        gathered.append(out.dtype)
        return original(self, numbers, rows, out)

    monkeypatch.setattr(JoinedRows, "take", take)
    stream = ShardStream(cache, batch_size=400, **shuffle)
    batches = list(one_epoch(stream))
    assert torch.int64 not in gathered
    early = batches[0].provenance
    stream.close()
    for batch, expected in zip(batches, alone, strict=True):
        assert torch.equal(batch.provenance, expected)
        assert batch.provenance is batch.provenance
    assert batches[0].provenance is early
    assert gathered.count(torch.int64) == len(batches)


ORDERS = {
    "few": "754a4511d6d8",
    "many": "754a4511d6d8",
    "held out": "349d7e1eec0f",
    "window": "90941a2a399e",
    "none": "da1c9b4a4a69",
}


@pytest.mark.parametrize("kind", ["few", "many", "held out", "window", "none"])
def test_the_order_of_the_rows_never_changes_between_versions(tmp_path, kind):
    """Checkpoints depend on it: with another order, rows would be served twice after a resume."""
    write_cache(tmp_path, n=N, shard_rows=50 if kind == "many" else 700)
    how = {
        "few": {"shuffle": "global"},
        "many": {"shuffle": "global"},
        "held out": {"shuffle": "global", "val_fraction": 0.4},
        "window": {"shuffle": "window", "window_bytes": 150_000, "val_fraction": 0.1},
        "none": {"shuffle": "none", "val_fraction": 0.1},
    }[kind]
    stream = ShardStream(tmp_path, batch_size=130, seed=3, rank=1, world_size=2, **how)
    served = [row for epoch in (0, 1) for batch in one_epoch(stream, epoch) for row in rows_of(batch)]
    assert hashlib.sha256(str(served).encode()).hexdigest()[:12] == ORDERS[kind]


def test_every_epoch_and_seed_has_another_order(cache):
    def order(seed, epoch, **shuffle):
        stream = ShardStream(cache, batch_size=N, seed=seed, **shuffle)
        return tuple(rows_of(next(stream.batches(stream.start(epoch), 0))))

    for shuffle in SHUFFLES[:2]:
        assert len({order(seed, epoch, **shuffle) for seed in (0, 1) for epoch in (0, 1)}) == 4
        assert order(1, 1, **shuffle) == order(1, 1, **shuffle)


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_another_number_of_ranks_resumes_without_losing_or_repeating_a_row(cache, shuffle):
    old = [ShardStream(cache, batch_size=50, rank=rank, world_size=3, **shuffle) for rank in range(3)]
    served, table = [], []
    for stream in old:
        batches = one_epoch(stream)
        for _ in range(7):
            batch = next(batches)
            served += rows_of(batch)
        table.append(RankProgress(position=batch.position, step=batch.step, rows=batch.step * 50))
    new = [ShardStream(cache, batch_size=40, rank=rank, world_size=2, **shuffle) for rank in range(2)]
    for stream in new:
        position, again = stream.rescaled(table)
        assert again == 0
        for batch in stream.batches(position, 0):
            served += rows_of(batch)
    assert sorted(served) == list(range(N))


def test_ranks_at_unequal_positions_report_how_many_rows_are_repeated(cache):
    table = []
    for rank, steps in ((0, 5), (1, 7)):
        batches = one_epoch(ShardStream(cache, batch_size=50, rank=rank, world_size=2))
        batch = [next(batches) for _ in range(steps)][-1]
        table.append(RankProgress(position=batch.position, step=batch.step, rows=batch.step * 50))
    stream = ShardStream(cache, batch_size=50)
    position, again = stream.rescaled(table)
    assert again == 100
    assert sum(len(batch.provenance) for batch in stream.batches(position, 0)) == N - 500


def test_a_position_of_another_number_of_ranks_is_refused(cache):
    position = ShardStream(cache, batch_size=50, world_size=2).start()
    with pytest.raises(
        ShardError,
        match=r"world_size=2, this stream has world_size=1: convert it with `ShardStream.rescaled`",
    ):
        next(ShardStream(cache, batch_size=50).batches(position, 0))


def test_a_position_of_a_live_stream_is_refused(cache):
    stream, live = ShardStream(cache, batch_size=50), LivePosition(epoch=0)
    with pytest.raises(ShardError, match="the position was taken in a live stream"):
        next(stream.batches(live, 0))
    with pytest.raises(ShardError, match="the position was taken in a live stream"):
        stream.dropped(live, 0)
    with pytest.raises(ShardError, match="the position was taken in a live stream"):
        stream.rescaled([RankProgress(position=live, step=0, rows=0)])


def test_a_position_survives_a_checkpoint(cache):
    stream = ShardStream(cache, batch_size=50, shuffle="window", window_bytes=10**5)
    position = next(one_epoch(stream, 2)).position
    assert ShardPosition.from_state(position.to_state()) == position


def test_the_split_is_by_document_hash_and_the_same_for_every_cache_of_the_documents(cache, tmp_path):
    write_cache(tmp_path, n=N, shard_rows=111)
    hashes = make_rows(N)[1][:, 0].numpy()
    for folder in (cache, tmp_path):
        for split, wanted in (("train", ~heldout(hashes, 0.3)), ("val", heldout(hashes, 0.3))):
            stream = ShardStream(folder, batch_size=100, split=split, val_fraction=0.3)
            served = [row for batch in one_epoch(stream) for row in rows_of(batch)]
            assert sorted(served) == np.flatnonzero(wanted).tolist()


def test_held_out_rows_can_be_limited_to_the_documents_of_lowest_hash(cache):
    hashes = make_rows(N)[1][:, 0].numpy()
    lowest = np.unique(hashes.view(np.uint64))[:5]
    stream = ShardStream(cache, batch_size=50, split="val", val_fraction=0.3, max_rows=5 * 37, shuffle="none")
    batches = list(one_epoch(stream))
    served = np.concatenate([batch.provenance[:, 0].numpy() for batch in batches])
    assert len(served) == 5 * 37
    assert set(served.view(np.uint64)) == set(lowest)


def test_the_smaller_last_batch_can_be_left_out(cache):
    kept, dropped = (ShardStream(cache, batch_size=256, drop_last=drop) for drop in (False, True))
    assert [len(batch.provenance) for batch in one_epoch(kept)] == [256] * 11 + [184]
    assert [len(batch.provenance) for batch in one_epoch(dropped)] == [256] * 11
    assert (kept.left_out(), dropped.left_out()) == (0, 184)
    assert (kept.steps(), dropped.steps()) == (12, 11)


def test_windows_hold_few_shards_open_and_mix_within_them(cache):
    stream = ShardStream(cache, batch_size=50, shuffle="window", window_bytes=100_000)
    most, seen = 0, []
    for batch in one_epoch(stream):
        most = max(most, len(stream._gatherer._open))
        seen.append(len({row // 700 for row in rows_of(batch)}))
    assert most <= 3
    assert np.mean(seen) < 1.5
    wide = ShardStream(cache, batch_size=50, shuffle="window", window_bytes=10**6)
    assert min(len({row // 700 for row in rows_of(batch)}) for batch in one_epoch(wide)) >= 3


def test_auto_is_global_where_memory_is_enough_and_windowed_on_request(cache):
    assert ShardStream(cache, batch_size=50).start().shuffle == "global"
    assert ShardStream(cache, batch_size=50, window_bytes=10**5).start().shuffle == "window"


def test_several_folders_and_globs_and_single_shards_are_read(tmp_path):
    for name, n in (("a", 500), ("b", 300)):
        write_cache(tmp_path / name, n=n, shard_rows=200)

    def rows(paths):
        return ShardStream(paths, batch_size=50).rows

    assert rows([tmp_path / "a", tmp_path / "b"]) == 800
    assert rows(str(tmp_path / "*")) == 800
    assert rows(str(tmp_path / "a" / "*.pt")) == 500
    assert rows(tmp_path / "a" / "rank00000-000002.pt") == 100
    assert rows([tmp_path / "b" / "rank00000-000000.pt", tmp_path / "a"]) == 700
    assert rows(f"file://{tmp_path}/a") == 500


def test_paths_without_rows_are_refused(cache, tmp_path):
    with pytest.raises(ShardError, match="matches nothing"):
        ShardStream(tmp_path / "nothing", batch_size=1)
    with pytest.raises(ShardError, match="matches nothing"):
        ShardStream(str(tmp_path / "*.pt"), batch_size=1)
    with pytest.raises(ShardError, match=r"not a cache: it has no manifest\.json and no \.pt"):
        ShardStream(tmp_path, batch_size=1)
    with pytest.raises(ShardError, match="shards= is empty"):
        ShardStream([], batch_size=1)
    with pytest.raises(ShardError, match=r"the val split has 0 of 3000 rows \(val_fraction=0\.0\)"):
        ShardStream(cache, batch_size=1, split="val")


def test_any_eighth_of_a_batch_is_a_sample_of_the_whole_cache(cache):
    for batch in one_epoch(ShardStream(cache, batch_size=800, drop_last=True)):
        for piece in torch.tensor(rows_of(batch)).split(100):
            assert len((piece // 700).unique()) == 5
            assert (piece.diff() > 0).all()


def test_two_iterators_of_one_stream_do_not_disturb_each_other(cache):
    stream = ShardStream(cache, batch_size=100)
    alone = list(one_epoch(stream))
    for one, other, expected in zip(one_epoch(stream), one_epoch(stream), alone, strict=True):
        assert_equal(one, expected)
        assert_equal(other, expected)


def test_nothing_is_left_running(cache):
    before = threading.active_count()
    stream = ShardStream(cache, batch_size=100, shuffle="window", window_bytes=10**5)
    list(one_epoch(stream))
    stream.close()
    assert threading.active_count() == before


def test_the_global_random_state_is_neither_used_nor_touched(cache):
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    list(one_epoch(ShardStream(cache, batch_size=100)))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    assert before[2] == random.getstate()


@pytest.mark.parametrize("pin_memory", [False, True])
def test_batches_are_in_pinned_memory_on_request_where_there_is_a_cuda_device(cache, pin_memory):
    served = next(one_epoch(ShardStream(cache, batch_size=100, pin_memory=pin_memory)))
    pinned = pin_memory and torch.cuda.is_available()
    assert all(tensor.is_pinned() == pinned for tensor in [served.provenance, *served.rows.values()])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's memory accounts")
def test_reading_a_cache_takes_the_memory_of_batches_not_of_the_cache(tmp_path):
    """With windows, mapped files too are limited; with a global shuffle the kernel may drop mapped files."""
    described = Manifest(hook_points={"a": Rows(d_in=1024, dtype="float32")})
    with ShardWriter(tmp_path, described, shard_bytes=2 * 2**20) as writer:
        for first in range(0, 30_000, 1000):
            rows = torch.full((1000, 1024), float(first))
            writer.append({"a": rows}, torch.zeros(1000, 4, dtype=torch.int64), source=None, first_row=first)
        writer.finish()
    cache = 30_000 * described.row_bytes
    code = (
        f"import tests.support.caches as m; [m.read_windows({str(tmp_path)!r}, w) for w in (8 * 2**20, None)]"
    )
    output = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},  # freed batches leave the process at once
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    (peak, own), (_, own_when_global) = (map(int, line.split()) for line in output.splitlines())
    assert cache > 110 * 2**20
    assert peak < 32 * 2**20
    assert max(own, own_when_global) < 8 * 2**20
