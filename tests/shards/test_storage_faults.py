"""Faults of storage and network: rows are equal to those on disk, or the error is one sentence, in a limited time."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from deeplens_lightning.shards import ShardError, ShardStream, ShardWriter, patience
from deeplens_lightning.shards.errors import UnreachableError
from deeplens_lightning.shards.names import MANIFEST, shard_name
from deeplens_lightning.shards.remote import RemoteFolder
from deeplens_lightning.shards.verify import verify
from tests.support.caches import WIDE, feed, make_rows, manifest, one_epoch, write_cache
from tests.support.storage_servers import FaultyProxy, faulty_proxy, http_server, s3_server

SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def s3() -> Iterator[FaultyProxy]:
    with (
        s3_server(AWS_MAX_ATTEMPTS="1") as upstream,
        faulty_proxy(upstream) as proxy,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        fsspec.filesystem("s3").clear_instance_cache()
        yield proxy
        proxy.released.set()


@pytest.fixture(params=[pytest.param("s3", marks=SLOW), "http"])
def served(
    request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, Path, FaultyProxy]]:
    """The URL of a cache behind a faulty proxy, the same cache on disk, and the proxy."""
    monkeypatch.setattr(patience, "WAITS", (0.01, 0.01))
    folder = tmp_path / "acts"
    write_cache(folder, n=2000, shard_rows=700)
    if request.param == "http":
        with http_server(tmp_path) as upstream, faulty_proxy(upstream) as proxy:
            yield f"{proxy.url}/acts", folder, proxy
        return
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)  # of its own, which take seconds
    proxy = request.getfixturevalue("s3")
    proxy.fault = lambda *_: None
    url = f"s3://bucket/{uuid.uuid4().hex}/acts"
    fs, root = fsspec.core.url_to_fs(url)
    fs.put(str(folder), root, recursive=True)
    fs.invalidate_cache()
    yield url, folder, proxy
    proxy.fault = lambda *_: None


def rows_of(where: str | Path, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    stream = ShardStream(where, batch_size=100, seed=1, **options)
    try:
        batches = list(one_epoch(stream))
    finally:
        stream.close()
    return torch.cat([batch.rows[WIDE] for batch in batches]), torch.cat([b.provenance for b in batches])


def write(where: str, timeout: float) -> None:
    with ShardWriter(where, manifest(), timeout=timeout) as writer:
        feed(writer, *make_rows(300))
        writer.finish()


def first(fault: str, ending: str = "") -> Callable[[str, str, int], str | None]:
    """The fault at the first request for every path."""
    return lambda method, path, before: (
        fault if not before and method == "GET" and path.endswith(ending) else None
    )


def always(fault: str, ending: str) -> Callable[[str, str, int], str | None]:
    return lambda method, path, before: fault if method == "GET" and path.endswith(ending) else None


def said(error: pytest.ExceptionInfo[BaseException]) -> str:
    """The message; it is one line and no Python object."""
    text = str(error.value)
    assert "\n" not in text
    assert " object at 0x" not in text
    return text


@pytest.mark.parametrize(
    "fault", ["drop", "truncated", *(pytest.param(name, marks=SLOW) for name in ("500", "503", "slow"))]
)
def test_a_fault_that_passes_changes_no_row(served: tuple[str, Path, FaultyProxy], fault: str) -> None:
    url, folder, proxy = served
    proxy.fault = first(fault)
    found, expected = rows_of(url), rows_of(folder)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_download_that_arrives_short_or_altered_is_fetched_once_more(
    served: tuple[str, Path, FaultyProxy],
) -> None:
    url, folder, proxy = served
    proxy.fault = first("short", ".pt")
    assert all(torch.equal(a, b) for a, b in zip(rows_of(url), rows_of(folder), strict=True))
    proxy.fault = always("short", "000001.pt")
    with pytest.raises(
        ShardError, match=r"000001\.pt (arrived with|cannot be read: Expected checksum)"
    ) as error:
        rows_of(url)
    said(error)


@pytest.mark.parametrize(
    "ending", [".pt", pytest.param("/acts", marks=SLOW), pytest.param(MANIFEST, marks=SLOW)]
)
@pytest.mark.parametrize(
    "fault", ["500", pytest.param("drop", marks=SLOW), pytest.param("truncated", marks=SLOW)]
)
def test_a_fault_that_stays_is_one_sentence_with_the_url(
    served: tuple[str, Path, FaultyProxy], fault: str, ending: str
) -> None:
    url, _, proxy = served
    if ending == "/acts":  # the listing
        ending = "bucket" if url.startswith("s3") else "acts/"
        proxy.fault = lambda method, path, _: fault if path.rstrip("/").endswith(ending.rstrip("/")) else None
    else:
        proxy.fault = always(fault, ending)
    with pytest.raises(UnreachableError) as error:
        rows_of(url)
    assert said(error).startswith(url)
    assert "then run the same command again" in said(error)


def test_verify_ends_at_the_first_shard_that_is_not_sent(served: tuple[str, Path, FaultyProxy]) -> None:
    """The other shards cannot be read either, and the cache may be intact: this is no problem of the cache."""
    url, _, proxy = served
    asked: set[str] = set()

    def refuse(method: str, path: str, _: int) -> str | None:
        if method != "GET" or not path.endswith(".pt"):
            return None
        asked.add(path)
        return "500"

    proxy.fault = refuse
    with pytest.raises(UnreachableError) as error:
        verify(url)
    assert said(error).startswith(url)
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("fault", "ending"),
    [
        ("silent", "000001.pt"),
        *(pytest.param("silent", ending, marks=SLOW) for ending in ("/acts", MANIFEST)),
        pytest.param("stuck", "000001.pt", marks=SLOW),
    ],
)
def test_a_server_that_sends_nothing_is_given_up(
    served: tuple[str, Path, FaultyProxy], fault: str, ending: str
) -> None:
    url, _, proxy = served
    if ending == "/acts":
        proxy.fault = lambda method, path, _: fault if not path.endswith((".pt", ".json")) else None
    else:
        proxy.fault = always(fault, ending)
    with pytest.raises(
        UnreachableError, match=r"given up after 1 seconds without a byte.*cache_options\.timeout"
    ) as error:
        rows_of(url, timeout=1)
    assert said(error).startswith(url)


@SLOW
def test_an_upload_that_is_not_answered_is_given_up(s3: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"s3://bucket/{uuid.uuid4().hex}/acts"
    s3.fault = lambda method, path, _: "silent" if method == "PUT" and path.endswith(".pt") else None
    try:
        with pytest.raises(UnreachableError, match=r"given up after .* seconds without a byte"):
            write(url, timeout=1)
        s3.fault = lambda *_: None
        write(url, timeout=60)
        assert rows_of(url)[0].shape == (300, 16)
    finally:
        s3.fault = lambda *_: None


@SLOW
def test_the_interpreter_ends_while_a_server_is_silent(tmp_path: Path) -> None:
    folder = tmp_path / "acts"
    write_cache(folder, n=2000, shard_rows=700)
    code = (
        "import sys; from deeplens_lightning.shards import ShardStream\n"
        "stream = ShardStream(sys.argv[1], batch_size=100, timeout=3600)\n"
        "stream._gatherer.move_to([0, 1, 2])\n"
        "print('prefetching', flush=True)"
    )
    with http_server(tmp_path) as upstream, faulty_proxy(upstream) as proxy:
        proxy.fault = always("silent", ".pt")
        ended = subprocess.run(
            [sys.executable, "-c", code, f"{proxy.url}/acts"], timeout=300, capture_output=True, text=True
        )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "prefetching\n", "")


def test_a_plain_http_server_serves_caches_files_and_globs(tmp_path: Path) -> None:
    folder = tmp_path / "acts"
    write_cache(folder, n=2000, shard_rows=700)
    (tmp_path / "bare").mkdir()
    torch.save(torch.randn(50, 8), tmp_path / "bare" / "features_layer_3_50.pt")
    with http_server(tmp_path) as url:
        for where, there in ((f"{url}/acts", folder), (f"{url}/acts/", folder), (f"{url}/acts/*.pt", folder)):
            assert all(torch.equal(a, b) for a, b in zip(rows_of(where), rows_of(there), strict=True))
        for where in (f"{url}/bare", f"{url}/bare/features_layer_3_50.pt"):
            stream = ShardStream(where, batch_size=10)
            assert stream.rows == 50
            stream.close()
        with pytest.raises(
            UnreachableError, match=r"nowhere cannot be listed: the server has no page of links"
        ):
            ShardStream(f"{url}/nowhere", batch_size=1)
        with pytest.raises(ShardError, match=r"cannot be written: HTTP is for reading"):
            RemoteFolder(f"{url}/bare").write(MANIFEST, b"{}")


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("http://127.0.0.1:9/acts", "check the address"),
        ("s3://bucket-without-keys/acts", "credentials"),
        ("nosuch://host/acts", "Protocol not known"),
        ("~nobody-of-this-name/acts", "is not a path"),
        ("a**b/*.pt", "is not a path"),
    ],
)
def test_what_cannot_be_reached_is_one_sentence(
    where: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(patience, "WAITS", (0.01, 0.01))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    fsspec.get_filesystem_class(where.partition(":")[0]).clear_instance_cache() if where.startswith(
        "s3"
    ) else None
    with pytest.raises(ShardError, match=words) as error:
        ShardStream(where, batch_size=1)
    said(error)


def test_a_full_local_disk_is_not_blamed_on_the_server(tmp_path: Path) -> None:
    url = f"memory://{uuid.uuid4().hex}/acts"
    write_cache(url, n=600)
    with pytest.raises(OSError, match="No space left on device") as error:
        RemoteFolder(url).download(shard_name(0, 0), Path("/dev/full"))
    assert error.value.filename == "/dev/full"
