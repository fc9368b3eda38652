"""Caches of format version 1 are read, say what cannot be checked, and can be written in the present version."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from deeplens_lightning.cli.main import main
from deeplens_lightning.shards import ShardError, ShardStream, ShardWriter, verify
from deeplens_lightning.shards.folder import LocalFolder
from deeplens_lightning.shards.format import VERSION
from deeplens_lightning.shards.names import INDEX, MANIFEST, shard_name
from tests.support.caches import feed, make_rows, manifest, one_epoch, read_back, write_cache
from tests.support.write_fixtures import ROWS, SHARD_ROWS

V1 = Path(__file__).parents[1] / "fixtures" / "v1" / "caches"
KINDS = ("exact", "int8", "two_ranks", "unfinished")


def copied(kind, tmp_path):
    return Path(shutil.copytree(V1 / kind, tmp_path / kind))


def served(folder):
    batches = list(one_epoch(ShardStream(folder, batch_size=30, shuffle="global", seed=3)))
    return [(batch.rows, batch.provenance) for batch in batches]


def assert_equal(one, other):
    for (rows, provenance), (same, too) in zip(one, other, strict=True):
        assert torch.equal(provenance, too)
        assert all(torch.equal(rows[name], same[name]) for name in rows)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_of_version_1_is_read_with_one_line_on_what_cannot_be_checked(kind, tmp_path, caplog):
    folder = copied(kind, tmp_path)
    rows, provenance = make_rows(ROWS)
    written = 2 * SHARD_ROWS if kind == "unfinished" else ROWS
    [batch] = one_epoch(ShardStream(folder, batch_size=ROWS, shuffle="none", checksums=True))
    assert torch.equal(batch.provenance, provenance[:written])
    if kind != "int8":
        assert all(torch.equal(batch.rows[name], rows[name][:written]) for name in rows)
    [line] = [record for record in caplog.records if "version 1" in record.message]
    assert line.levelno == logging.WARNING
    assert f"deeplens-lightning verify {folder} --upgrade" in line.message
    assert verify(folder).problems == []


@pytest.mark.parametrize("kind", KINDS)
def test_an_upgraded_cache_serves_the_same_batches_and_says_nothing(kind, tmp_path, caplog, capsys):
    folder = copied(kind, tmp_path)
    before, shards = served(folder), {path.name: path.read_bytes() for path in folder.glob("*.pt")}
    main(["verify", str(folder), "--upgrade"])
    assert f"{folder} has the present format version now" in capsys.readouterr().out
    caplog.clear()
    assert_equal(served(folder), before)
    assert "version 1" not in caplog.text
    assert {path.name: path.read_bytes() for path in folder.glob("*.pt")} == shards
    assert all(json.loads(path.read_text())["version"] == VERSION for path in folder.glob("*.json"))
    assert verify(folder).problems == []
    assert verify(folder, upgrade=True).upgraded == ()


def test_an_unfinished_cache_of_version_1_is_continued_after_its_upgrade(tmp_path):
    folder = copied("unfinished", tmp_path)
    with pytest.raises(ShardError, match=f"deeplens-lightning verify {folder} --upgrade"):
        ShardWriter(folder, manifest())
    verify(folder, upgrade=True)
    with ShardWriter(folder, manifest(), shard_bytes=SHARD_ROWS * manifest().row_bytes) as writer:
        feed(writer, *make_rows(ROWS), batch=20)
        writer.finish()
    assert verify(folder).problems == []
    assert torch.equal(read_back(folder)[1], make_rows(ROWS)[1])


def test_a_finished_cache_of_version_1_is_left_alone_by_a_writer(tmp_path):
    folder = copied("exact", tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with ShardWriter(folder, manifest()) as writer:
        assert writer.complete
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_damaged_cache_is_not_upgraded(tmp_path):
    folder = copied("exact", tmp_path)
    content = bytearray((folder / shard_name(0, 1)).read_bytes())
    content[1000] ^= 1
    (folder / shard_name(0, 1)).write_bytes(content)
    assert len(verify(folder, upgrade=True).problems) == 1
    assert json.loads((folder / MANIFEST).read_text())["version"] == 1


@pytest.mark.parametrize("kind", ["exact", "two_ranks"])
def test_an_upgrade_killed_after_any_file_leaves_a_cache_that_is_read_and_upgraded(
    kind, tmp_path, monkeypatch
):
    whole = served(V1 / kind)
    write, written = LocalFolder.write, []

    def dying(self, name, content):
        if len(written) == deadline:
            raise KeyboardInterrupt
        written.append(name)
        write(self, name, content)

    count = 2 * len(list((V1 / kind).glob("*.pt"))) + 1  # more than the files that are written
    for deadline in range(count):
        written.clear()
        folder = copied(kind, tmp_path / str(deadline))
        with monkeypatch.context() as patch:
            patch.setattr(LocalFolder, "write", dying)
            try:
                verify(folder, upgrade=True)
            except KeyboardInterrupt:
                killed = True
            else:
                killed = False
                break
        assert_equal(served(folder), whole)
        assert verify(folder, upgrade=True).problems == []
        assert_equal(served(folder), whole)
    assert not killed
    assert written[-2:] == [INDEX, MANIFEST]


def test_single_shards_are_not_upgraded(tmp_path):
    folder = copied("exact", tmp_path)
    with pytest.raises(ShardError, match="give the folder, not single shards"):
        verify(folder / shard_name(0, 1), upgrade=True)


def test_a_cache_that_is_being_written_is_not_upgraded(tmp_path):
    folder = copied("exact", tmp_path)
    lock = LocalFolder(folder).lock(".lock-rank00000")
    try:
        with pytest.raises(ShardError, match="another process is writing"):
            verify(folder, upgrade=True)
    finally:
        lock.release()


def test_a_file_of_version_1_in_a_cache_of_version_2_is_refused(tmp_path):
    write_cache(tmp_path / "two", n=ROWS, shard_rows=SHARD_ROWS)
    for name in (INDEX, "rank00000-000001.json"):
        folder = Path(shutil.copytree(tmp_path / "two", tmp_path / name))
        shutil.copy(V1 / "exact" / name, folder / name)
        with pytest.raises(ShardError, match=f"{name} belongs to another cache"):
            ShardStream(folder, batch_size=10)
