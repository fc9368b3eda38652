"""`ShardWriter`: every row once and in order, also after kills; errors name the reason."""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pytest
import torch

from deeplens_lightning.shards import (
    DamagedShardError,
    DiskFullError,
    NonFiniteError,
    OtherConfigError,
    ShardError,
    ShardStream,
    ShardWriter,
    verify,
)
from deeplens_lightning.shards.names import INDEX, done_name, shard_name, sidecar_name
from deeplens_lightning.shards.sidecar import Sidecar
from tests.support.caches import (
    NARROW,
    WIDE,
    feed,
    make_rows,
    manifest,
    one_epoch,
    read_back,
    write_cache,
    write_here,
)


def shards_of(rows: int) -> int:
    return rows * manifest().row_bytes


def assert_same_cache(one, other):
    (rows, provenance), (same, too) = read_back(one), read_back(other)
    assert torch.equal(provenance, too)
    assert all(torch.equal(rows[name], same[name]) for name in rows)


@pytest.mark.parametrize("batch", [1, 33, 100, 5000])
def test_every_row_is_written_once_in_order(tmp_path, batch):
    rows, provenance = make_rows(1500)
    with ShardWriter(tmp_path, manifest(), shard_bytes=shards_of(400)) as writer:
        feed(writer, rows, provenance, batch)
        writer.finish()
    written, where = read_back(tmp_path)
    assert torch.equal(where, provenance)
    assert torch.equal(written[WIDE], rows[WIDE])
    assert torch.equal(written[NARROW], rows[NARROW])
    assert writer.complete
    assert (writer.rows, writer.shards) == (1500, 4)
    assert verify(tmp_path).problems == []


def test_a_finished_cache_is_left_alone(tmp_path):
    write_cache(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with ShardWriter(tmp_path, manifest()) as writer:
        assert writer.complete
        writer.finish()
        with pytest.raises(ShardError, match="finished"):
            feed(writer, *make_rows(10))
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_a_cache_written_in_two_runs_equals_one_written_in_one_run(tmp_path):
    write_cache(tmp_path / "whole", n=2500, shard_rows=300)
    for stop in (0, 99, 300, 1234, 2400):
        folder = tmp_path / str(stop)
        rows, provenance = make_rows(2500)
        with ShardWriter(folder, manifest(), shard_bytes=shards_of(300)) as writer:
            feed(writer, rows, provenance, stop=stop)
        with ShardWriter(folder, manifest(), shard_bytes=shards_of(300)) as writer:
            assert writer.resume.row == -(-stop // 100) * 100 // 300 * 300  # batches of 100, shards of 300
            assert writer.rows == writer.resume.row
            feed(writer, rows, provenance)
            writer.finish()
        assert_same_cache(folder, tmp_path / "whole")


def test_a_shard_size_may_change_between_runs(tmp_path):
    rows, provenance = make_rows(2000)
    with ShardWriter(tmp_path, manifest(), shard_bytes=shards_of(300)) as writer:
        feed(writer, rows, provenance, stop=1000)
    with ShardWriter(tmp_path, manifest(), shard_bytes=shards_of(700)) as writer:
        feed(writer, rows, provenance, batch=77)
        writer.finish()
    assert torch.equal(read_back(tmp_path)[1], provenance)


def test_repeated_rows_are_dropped_and_a_gap_is_refused(tmp_path):
    rows, provenance = make_rows(500)
    with ShardWriter(tmp_path, manifest()) as writer:
        for first in (0, 0, 50, 100, 30):
            part = slice(first, first + 100)
            writer.append(
                {k: v[part] for k, v in rows.items()}, provenance[part], source=first, first_row=first
            )
        with pytest.raises(ShardError, match="rows 200 to 249 of rank 0 are not in the cache"):
            writer.append(
                {k: v[250:300] for k, v in rows.items()}, provenance[250:300], source=0, first_row=250
            )
        writer.finish()
    assert torch.equal(read_back(tmp_path)[1], provenance[:200])


def test_sync_makes_everything_so_far_durable(tmp_path):
    rows, provenance = make_rows(500)
    with ShardWriter(tmp_path, manifest()) as writer:
        feed(writer, rows, provenance, stop=200)
        writer.sync()
        feed_more = slice(200, 300)
        writer.append(
            {k: v[feed_more] for k, v in rows.items()},
            provenance[feed_more],
            source={"row": 200},
            first_row=200,
        )
    with ShardWriter(tmp_path, manifest()) as writer:
        assert writer.resume.row == 200
        feed(writer, rows, provenance)
        writer.finish()
    assert torch.equal(read_back(tmp_path)[1], provenance)


def test_one_thread_may_append_while_another_syncs(tmp_path):
    """As a producer and the main thread do, which syncs before each checkpoint."""
    rows, provenance = make_rows(40_000)
    before = sys.getswitchinterval()
    with (
        ThreadPoolExecutor(1) as pool,
        ShardWriter(tmp_path, manifest(), shard_bytes=shards_of(3000)) as writer,
    ):
        sys.setswitchinterval(1e-5)
        try:
            producer = pool.submit(feed, writer, rows, provenance, batch=20)
            while wait([producer], timeout=0.001).not_done:
                writer.sync()
        finally:
            sys.setswitchinterval(before)
        producer.result()
        writer.finish()
    written, where = read_back(tmp_path)
    assert torch.equal(where, provenance)
    assert all(torch.equal(written[name], rows[name]) for name in rows)
    assert writer.shards > 40_000 // 3000 + 1
    assert verify(tmp_path).problems == []
    seen = 0
    for number in range(writer.shards):
        name = sidecar_name(shard_name(0, number))
        sidecar = Sidecar.parse((tmp_path / name).read_bytes(), name)
        index = provenance[seen : seen + sidecar.rows, 1].numpy()
        seen += sidecar.rows
        assert sidecar.next.row == seen
        assert sidecar.documents.arrays()[1].tolist() == np.unique(index, return_counts=True)[1].tolist()


def test_two_ranks_write_one_cache_and_the_last_one_closes_it(tmp_path):
    rows, provenance = make_rows(1000)
    writers = [
        ShardWriter(tmp_path, manifest(world_size=2), rank=rank, shard_bytes=shards_of(200))
        for rank in (0, 1)
    ]
    for rank, writer in enumerate(writers):
        half = slice(rank * 500, rank * 500 + 500)
        writer.append({k: v[half] for k, v in rows.items()}, provenance[half], source=None, first_row=0)
    writers[1].finish()
    assert not writers[1].complete
    assert not (tmp_path / INDEX).exists()
    writers[0].finish()
    assert writers[0].complete
    assert torch.equal(read_back(tmp_path)[1], provenance)
    ShardWriter(tmp_path, manifest(world_size=3)).close()  # complete: by how many ranks does not matter


def test_another_number_of_ranks_cannot_continue(tmp_path):
    ShardWriter(tmp_path, manifest(world_size=2)).close()
    with pytest.raises(ShardError, match=r"started by 2 rank\(s\)"):
        ShardWriter(tmp_path, manifest())


def test_another_configuration_is_refused(tmp_path):
    write_cache(tmp_path)
    with pytest.raises(OtherConfigError, match="seq_length: 37 there, 64 here"):
        ShardWriter(tmp_path, manifest(packing={"seq_length": 64}))


def test_a_folder_of_other_tensors_is_refused(tmp_path):
    torch.save(torch.zeros(2, 2), tmp_path / "model.pt")
    with pytest.raises(ShardError, match="choose another folder"):
        ShardWriter(tmp_path, manifest())


def test_a_second_writer_is_refused_and_the_first_continues(tmp_path):
    with ShardWriter(tmp_path, manifest()) as writer:
        with pytest.raises(ShardError, match="another process is writing"):
            ShardWriter(tmp_path, manifest())
        feed(writer, *make_rows(300))
        writer.finish()
    assert verify(tmp_path).problems == []


def test_a_second_writer_that_no_lock_stopped_is_noticed(tmp_path):
    """As on an object store, which has no locks."""
    rows, provenance = make_rows(300)
    with ShardWriter(tmp_path, manifest(), shard_bytes=shards_of(100)) as writer:
        feed(writer, rows, provenance, stop=100)
        writer.sync()
        (tmp_path / sidecar_name(shard_name(0, 1))).write_text("{}")
        feed(writer, rows, provenance, stop=200)
        with pytest.raises(ShardError, match="another process writes"):
            writer.finish()
    assert not (tmp_path / INDEX).exists()


def test_damage_in_a_finished_cache_is_repaired_by_running_again(tmp_path):
    write_cache(tmp_path / "whole", n=1000, shard_rows=300)
    write_cache(tmp_path / "other", n=1000, shard_rows=300)
    shard = tmp_path / "other" / shard_name(0, 1)
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(
        DamagedShardError, match=r"000001.pt has .* delete it and run the command that wrote it again"
    ):
        ShardWriter(tmp_path / "other", manifest())
    shard.unlink()
    with ShardWriter(tmp_path / "other", manifest(), shard_bytes=shards_of(300)) as writer:
        assert not writer.complete
        assert writer.resume.row == 300
        feed(writer, *make_rows(1000))
        writer.finish()
    assert_same_cache(tmp_path / "whole", tmp_path / "other")
    assert verify(tmp_path / "other").problems == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_refused_with_their_place(tmp_path, bad):
    rows, provenance = make_rows(200)
    rows[NARROW][137, 3] = bad
    with (
        ShardWriter(tmp_path, manifest()) as writer,
        pytest.raises(
            NonFiniteError, match=f"position {137 % 37} of the document with hash {provenance[137, 0]}"
        ),
    ):
        feed(writer, rows, provenance)


def test_rows_that_are_not_finite_are_dropped_and_counted_by_choice_also_when_resumed(tmp_path):
    rows, provenance = make_rows(1000)
    bad = torch.tensor([0, 99, 100, 137, 500, 501, 502, 999])
    rows[WIDE][bad] = float("nan")
    good = torch.tensor([row for row in range(1000) if row not in bad])
    for stops in ([None], [100, 300, 600, None], [500, None]):
        folder = tmp_path / str(len(stops))
        for stop in stops:
            with ShardWriter(folder, manifest(), shard_bytes=shards_of(37), nonfinite="drop") as writer:
                feed(writer, rows, provenance, stop=stop)
                if stop is None:
                    writer.finish()
        assert torch.equal(read_back(folder)[1], provenance[good])
        assert json.loads((folder / done_name(0)).read_text())["dropped"] == len(bad)


def test_rows_of_another_shape_or_dtype_are_refused(tmp_path):
    rows, provenance = make_rows(10)
    with ShardWriter(tmp_path, manifest()) as writer:
        with pytest.raises(ShardError, match=r"torch.float64 \(10, 16\), the manifest says float32"):
            writer.append({**rows, WIDE: rows[WIDE].double()}, provenance, source=None, first_row=0)
        with pytest.raises(ShardError, match="the manifest says"):
            writer.append({WIDE: rows[WIDE]}, provenance, source=None, first_row=0)


def test_8_bit_shards_are_read_within_their_error(tmp_path):
    write_cache(tmp_path, storage="int8")
    rows, provenance = make_rows(3000)
    [served] = one_epoch(ShardStream(tmp_path, batch_size=3000, shuffle="none"))
    assert torch.equal(served.provenance, provenance)
    for name in (WIDE, NARROW):
        assert served.rows[name].dtype == rows[name].dtype
        bound = rows[name].float().abs().amax(dim=1, keepdim=True) / (254 if name == WIDE else 120)
        assert ((served.rows[name].float() - rows[name].float()).abs() <= bound * 1.001).all()


def test_too_little_free_space_is_an_error_before_starting(tmp_path):
    with pytest.raises(DiskFullError, match=r"bytes free, 1,000,000,000,000,000 rows need [\d,]+ bytes more"):
        ShardWriter(tmp_path, manifest(), expected_rows=10**15)


def write_and_report(report, *arguments):
    """Run `write_here` in a child process and send the message of its error back."""
    try:
        write_here(*arguments)
    except BaseException as error:
        report.send(str(error))
        raise


def test_a_full_disk_stops_the_writer_and_leaves_a_valid_cache(tmp_path, processes):
    """A file-size limit fails writes half way through a file, as a full disk does."""
    write_cache(tmp_path / "whole", n=2000, shard_rows=500)
    rows, provenance = make_rows(2000)
    with ShardWriter(tmp_path / "a", manifest(), shard_bytes=shards_of(500)) as writer:
        feed(writer, rows, provenance, stop=1000)
    for limit, code in ((shards_of(250), 1), (None, 0)):
        receive, send = processes.Pipe(duplex=False)
        process = processes.Process(
            target=write_and_report, args=(send, str(tmp_path / "a"), 2000, limit), daemon=True
        )
        process.start()
        process.join(600)
        assert process.exitcode == code
        assert not list((tmp_path / "a").glob(".writing*"))
        if code:
            assert receive.poll(60)
            assert "bytes are missing. Its 2 finished shards (1,000 rows) are valid" in receive.recv()
            assert not (tmp_path / "a" / INDEX).exists()
            assert ShardStream(tmp_path / "a", batch_size=10).rows == 1000
    assert_same_cache(tmp_path / "a", tmp_path / "whole")


def test_a_writer_that_failed_cannot_continue_and_lose_rows(tmp_path, monkeypatch):
    rows, provenance = make_rows(1000)
    with ShardWriter(tmp_path, manifest(), shard_bytes=shards_of(100)) as writer:
        feed(writer, rows, provenance, stop=100)
        writer.sync()
        monkeypatch.setattr(type(writer._folder), "free_bytes", lambda self: 1000)
        feed(writer, rows, provenance, stop=200)
        with pytest.raises(DiskFullError):
            writer.sync()
        monkeypatch.undo()
        with pytest.raises(DiskFullError):
            writer.finish()
    assert not (tmp_path / INDEX).exists()


def test_a_killed_writer_run_again_equals_an_uninterrupted_one_and_shows_no_incomplete_file(
    tmp_path, processes
):
    """A run blocks when it has written 20 shards more than it found; it is killed before that, or then."""
    write_cache(tmp_path / "whole", n=80_000, shard_rows=500)
    folder, checked = tmp_path / "killed", 0
    for delay in (0.0, 0.004, 0.01, 0.02, 0.03, 0.05, 0.07):
        found = _check_finished(folder)
        stop = 500 * (found + 20)
        process = processes.Process(target=write_here, args=(str(folder), 80_000, None, stop))
        process.start()
        while _check_finished(folder) == found:
            assert process.is_alive(), "the run ended before it was killed"
            checked += 1
        deadline = time.monotonic() + delay
        while time.monotonic() < deadline:
            checked += _check_finished(folder)
        assert process.is_alive(), "the run ended before it was killed"
        process.kill()
        process.join()
        checked += _check_finished(folder)
    process = processes.Process(target=write_here, args=(str(folder), 80_000))
    process.start()
    while process.is_alive():
        checked += _check_finished(folder)
    process.join()
    assert process.exitcode == 0
    assert checked > 10
    assert_same_cache(folder, tmp_path / "whole")
    assert verify(folder).problems == []
    assert not list(folder.glob(".writing*"))


def _check_finished(folder: Path) -> int:
    """Check that every file under a final name is complete; the number of shards.

    A run that continues deletes a shard that was killed before its sidecar was written; no other file ever vanishes.
    """
    if not (folder / sidecar_name(shard_name(0, 0))).exists():
        return 0
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    done = sorted(name for name in names if name.endswith(".pt"))
    for name in done[-3:]:
        try:
            content = torch.load(folder / name, mmap=True, weights_only=True)
        except FileNotFoundError:
            assert sidecar_name(name) not in names, f"{name} was finished, and vanished"
            continue
        assert len(content["provenance"]) == 500
    for name in names:
        if name.endswith(".json"):
            json.loads((folder / name).read_text())
    return len(done)
