"""Caches behind a URL: `memory://`, and a real S3 server on this machine."""

import os
import threading
import uuid

import fsspec
import pytest
import torch

from deeplens_lightning.shards import DamagedShardError, ShardError, ShardStream, ShardWriter, verify
from deeplens_lightning.shards.local_copies import LocalCopies
from deeplens_lightning.shards.names import INDEX, done_name, shard_name, sidecar_name
from deeplens_lightning.shards.remote import RemoteFolder
from tests.support.caches import WIDE, feed, make_rows, manifest, on_disk, one_epoch, write_cache
from tests.support.storage_servers import s3_server

SHARD = 700 * manifest().row_bytes


@pytest.fixture(scope="module")
def s3():
    """The environment of an S3 server with a bucket `bucket`."""
    with s3_server():
        yield


@pytest.fixture(params=["memory", "s3"])
def url(request):
    if request.param == "s3":
        request.getfixturevalue("s3")
        return f"s3://bucket/{uuid.uuid4().hex}/acts"
    return f"memory://{uuid.uuid4().hex}/acts"


def serve(paths, **kwargs):
    stream = ShardStream(paths, batch_size=64, **kwargs)
    batches = list(one_epoch(stream))
    stream.close()
    return batches


def copied(copies, folder, name, size, sha256):
    with copies.opened(folder, name, size, sha256) as path:
        return path


def assert_equal(some, others):
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert torch.equal(one.provenance, other.provenance)
        assert torch.equal(one.rows[WIDE], other.rows[WIDE])


def test_a_remote_cache_written_in_two_runs_equals_one_on_disk(url, tmp_path):
    write_cache(tmp_path, n=3000, shard_rows=700)
    rows, provenance = make_rows(3000)
    for stop in (1000, 2000, None):
        with ShardWriter(url, manifest(), shard_bytes=SHARD) as writer:
            assert writer.resume.row == {1000: 0, 2000: 700, None: 1400}[stop]
            feed(writer, rows, provenance, stop=stop)
            if stop is None:
                writer.finish()
                assert writer.complete
    with ShardWriter(url, manifest()) as writer:
        assert writer.complete
    assert verify(url).problems == []
    for kwargs in (
        {"shuffle": "global"},
        {"shuffle": "window", "window_bytes": 10**5},
        {"val_fraction": 0.3},
    ):
        assert_equal(serve(url, **kwargs), serve(tmp_path, **kwargs))
    assert_equal(serve(f"{url}/*.pt"), serve(tmp_path))


def test_resuming_from_a_url_continues_bit_for_bit(url):
    write_cache(url, n=2000, shard_rows=300)
    window = {"shuffle": "window", "window_bytes": 10**5, "seed": 3}
    whole = serve(url, **window)
    stream = ShardStream(url, batch_size=64, **window)
    assert_equal(list(stream.batches(whole[16].position, whole[16].step)), whole[17:])
    stream.close()


def test_local_copies_stay_within_their_bound_and_are_deleted_at_the_end(url, tmp_path):
    write_cache(url, n=6000, shard_rows=300)
    shard = 300 * manifest().row_bytes
    bound = 6 * (shard + 3000)
    stream = ShardStream(url, batch_size=64, window_bytes=10**9, cache_bytes=bound, cache_dir=tmp_path)
    assert stream.start().shuffle == "window"
    most = 0
    for _ in one_epoch(stream):
        most = max(most, on_disk(tmp_path))
    assert shard * 3 < most <= bound
    stream.close()
    with pytest.raises(
        ShardError, match=r"shuffle='global' needs local copies of all [\d,]+ bytes of remote shards"
    ):
        ShardStream(url, batch_size=64, shuffle="global", cache_bytes=bound)
    with pytest.raises(ShardError, match=r"raise cache_options\.bytes \(cache_bytes= of ShardStream\)"):
        serve(url, cache_bytes=shard // 2)


def test_copies_in_a_temporary_folder_are_deleted(url):
    write_cache(url, n=600)
    stream = ShardStream(url, batch_size=64)
    list(one_epoch(stream))
    folder = stream._copies._directory
    assert list(folder.rglob("*.pt"))
    stream.close()
    assert not folder.exists()


def test_a_given_folder_of_copies_is_used_again_unless_altered(url, tmp_path):
    write_cache(url, n=600)
    first = serve(url, cache_dir=tmp_path)
    [copy] = tmp_path.rglob("*.pt")
    stamp = copy.stat().st_mtime_ns
    assert_equal(serve(url, cache_dir=tmp_path), first)
    assert copy.stat().st_mtime_ns == stamp
    copy.write_bytes(copy.read_bytes()[:-1])
    assert_equal(serve(url, cache_dir=tmp_path), first)


def test_a_copy_that_is_altered_or_missing_is_named(url):
    write_cache(url, n=2000, shard_rows=700)
    fs, root = fsspec.core.url_to_fs(url)
    path = f"{root}/{shard_name(0, 1)}"
    content = bytearray(fs.cat_file(path))
    content[5000] ^= 1
    fs.pipe_file(path, bytes(content))
    with pytest.raises(DamagedShardError, match=r"000001\.pt is altered: its checksum is"):
        serve(url)
    assert "000001.pt is altered" in verify(url).problems[0]
    fs.pipe_file(path, bytes(content[:-1]))
    with pytest.raises(DamagedShardError, match=r"000001\.pt has .* bytes, its sidecar says"):
        serve(url)
    fs.rm(path)
    with pytest.raises(DamagedShardError, match=r"000001\.pt is missing"):
        serve(url)


def test_a_second_writer_is_noticed_without_locks(url):
    rows, provenance = make_rows(2000)
    with (
        ShardWriter(url, manifest(), shard_bytes=SHARD) as one,
        ShardWriter(url, manifest(), shard_bytes=SHARD) as two,
    ):
        feed(one, rows, provenance, stop=800)
        one.sync()
        feed(two, rows, provenance, stop=700)
        with pytest.raises(ShardError, match="another process writes"):
            two.sync()
        feed(one, rows, provenance)
        one.finish()
    assert verify(url).problems == []


def test_no_incomplete_file_ever_has_a_final_name(tmp_path):
    """`memory://` shows files while they are written, so finished ones are moved into place."""
    url = f"memory://{uuid.uuid4().hex}"
    fs, root = fsspec.core.url_to_fs(url)
    half, stop = [], threading.Event()

    def watch():
        while not stop.is_set():
            # `fs.glob` and `fs.size` lock the buffers that are being written
            for path in [
                path for path in list(fs.store) if path.startswith(f"{root}/") and path.endswith(".pt")
            ]:
                name = path.rsplit("/", 1)[-1]
                try:
                    size = len(fs.store[path].getvalue())
                except KeyError:
                    continue
                if not name.startswith(".") and size < SHARD:
                    half.append((name, size))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        write_cache(url, n=7000, shard_rows=700)
    finally:
        stop.set()
        watcher.join()
    assert half == []
    assert not [path for path in fs.ls(root, detail=False) if ".writing" in path]


def test_bare_tensors_behind_a_url(url, tmp_path):
    rows = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    torch.save(rows, tmp_path / "features_layer_3_1000.pt")
    fs, root = fsspec.core.url_to_fs(url)
    fs.makedirs(root, exist_ok=True)
    fs.put_file(str(tmp_path / "features_layer_3_1000.pt"), f"{root}/features_layer_3_1000.pt")
    [served] = one_epoch(ShardStream(f"{url}/features_layer_3_1000.pt", batch_size=1000, shuffle="none"))
    assert torch.equal(served.rows["layers.3.mlp_act"], rows)


def test_an_empty_url_is_refused(url):
    with pytest.raises(ShardError, match=r"no manifest\.json and no \.pt file"):
        ShardStream(url, batch_size=1)


def test_an_unfinished_remote_cache_is_read_up_to_its_last_finished_shard(url):
    write_cache(url, n=2000, shard_rows=700)
    RemoteFolder(url).remove(INDEX)
    RemoteFolder(url).remove(done_name(0))
    RemoteFolder(url).remove(sidecar_name(shard_name(0, 2)))
    assert ShardStream(url, batch_size=1).rows == 1400


def test_deleting_an_old_copy_waits_until_it_is_fetched(url, tmp_path):
    write_cache(url, n=3000, shard_rows=300)
    folder = RemoteFolder(url)
    size = folder.sizes()[shard_name(0, 0)]
    copies = LocalCopies(tmp_path, max_bytes=2 * size + 10)
    for number in range(9):
        copies.fetch(folder, shard_name(0, number), size, None)
    path = copied(copies, folder, shard_name(0, 8), size, None)
    assert path.stat().st_size == size
    copies.close()
    assert sum(1 for _ in tmp_path.rglob("*.pt")) <= 2
    assert not [name for _, _, names in os.walk(tmp_path) for name in names if "writing" in name]


def test_copies_of_earlier_runs_count_and_the_oldest_are_deleted_first(tmp_path):
    url = f"memory://{uuid.uuid4().hex}/acts"
    write_cache(url, n=3000, shard_rows=300)
    folder = RemoteFolder(url)
    sizes = folder.sizes()
    names = [shard_name(0, number) for number in range(6)]
    earlier = LocalCopies(tmp_path)
    paths = [copied(earlier, folder, name, sizes[name], None) for name in names[:4]]
    earlier.close()
    unfinished = paths[0].with_name(".writing-of-a-killed-run")
    unfinished.write_bytes(bytes(100))
    other = tmp_path / "notes.pt"
    other.write_bytes(bytes(10**6))
    for age, path in enumerate((unfinished, paths[2], paths[0], paths[3], paths[1])):
        os.utime(path, (age, age))
    copies = LocalCopies(tmp_path, max_bytes=sum(sizes[name] for name in names[:4]) + 50)
    copied(copies, folder, names[0], sizes[names[0]], None)
    assert not unfinished.exists()
    assert all(path.exists() for path in paths)
    copied(copies, folder, names[4], sizes[names[4]], None)
    assert [path.exists() for path in paths] == [True, True, False, True]
    copied(copies, folder, names[5], sizes[names[5]], None)
    assert [path.exists() for path in paths] == [True, True, False, False]
    copies.close()
    assert other.exists()


def test_a_copy_that_another_stream_deleted_is_fetched_again(tmp_path):
    url = f"memory://{uuid.uuid4().hex}/acts"
    write_cache(url, n=2000, shard_rows=300)
    folder = RemoteFolder(url)
    name, size = shard_name(0, 0), folder.sizes()[shard_name(0, 0)]
    one, other = LocalCopies(tmp_path, max_bytes=size), LocalCopies(tmp_path, max_bytes=size)
    path = copied(one, folder, name, size, None)
    content = path.read_bytes()
    copied(other, folder, shard_name(0, 1), size, None)
    path.unlink(missing_ok=True)
    assert copied(one, folder, name, size, None).read_bytes() == content
    one.close()
    other.close()
