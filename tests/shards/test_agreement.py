"""Index, sidecars, marks, shards and files of a cache must agree, in reading, in verifying and in writing on."""

import json
import shutil

import pytest
import torch

from deeplens_lightning.shards import DamagedShardError, ShardError, ShardStream, ShardWriter, verify
from deeplens_lightning.shards.names import INDEX, MANIFEST, done_name, shard_name, sidecar_name
from tests.support.caches import (
    edit,
    feed,
    forge_sidecar,
    make_rows,
    manifest,
    one_epoch,
    read_manifest,
    write_cache,
)

SIDECAR = sidecar_name(shard_name(0, 1))


@pytest.fixture
def cache(tmp_path):
    write_cache(tmp_path / "acts", n=600, shard_rows=200)
    return tmp_path / "acts"


def refused(cache, match):
    """Check that reading and `verify` refuse a cache; what `verify` says."""
    with pytest.raises(DamagedShardError, match=match):
        ShardStream(cache, batch_size=10)
    problems = verify(cache).problems
    assert problems
    return "\n".join(problems)


def list_twice(index):
    index["shards"].append(index["shards"][1])


def totals(index):
    for key in ("rows", "nbytes"):
        index[key] = sum(entry[key] for entry in index["shards"])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (list_twice, r"lists rank00000-000001\.pt twice"),
        (lambda index: index["shards"].pop(), r"does not list rank00000-000002\.(json|pt)"),
        (
            lambda index: index["shards"].pop(0),
            r"lists rank00000-000001\.pt twice, out of order, or after a gap",
        ),
        (lambda index: index["shards"].reverse(), "out of order"),
        (lambda index: index["shards"][1].update(rows=100), "say different things of rank00000-000001"),
        (
            lambda index: index["shards"][1].update(sha256=None),
            r"shards\[1\]\.sha256 is None, expected a string",
        ),
        (lambda index: index["shards"][1].update(sha256="0" * 64), "say different things"),
        (lambda index: index["shards"][1].update(more=1), r"shards\[1\]\.more is not known"),
        (lambda index: index.update(manifest="0" * 64), "belongs to another cache"),
        (lambda index: index.update(sidecars="0" * 64), "are not those that its index.json was written for"),
    ],
)
def test_an_index_that_says_something_else_than_the_sidecars_is_refused(cache, change, match):
    edit(cache / INDEX, lambda index: (change(index), totals(index)))
    assert "index.json" in refused(cache, match)


def test_an_index_with_totals_of_its_own_is_refused(cache):
    edit(cache / INDEX, lambda index: index.update(rows=601))
    assert "totals" in refused(cache, "totals that are not the sums")


@pytest.mark.parametrize("name", [INDEX, SIDECAR, MANIFEST, done_name(0)])
def test_one_changed_character_in_a_json_file_is_noticed(cache, name):
    text = (cache / name).read_text()
    for key in ("rows", "sha256", "manifest", "config"):
        if f'"{key}"' in text:
            (cache / name).write_text(text.replace(f'"{key}"', f'"{key[:-1]}X"', 1))
            assert name in refused(cache, "it is altered: its content does not have the digest")


def test_a_changed_document_hash_never_moves_rows_between_training_and_validation(cache):
    """Also where someone gave the sidecar a new digest and deleted the index."""
    other = sidecar_name(shard_name(0, 0))
    documents = json.loads((cache / other).read_text())["documents"]
    hashes = "A" + documents["hashes"][1:] if documents["hashes"][0] != "A" else "B" + documents["hashes"][1:]
    edit(cache / other, lambda sidecar: sidecar["documents"].update(hashes=hashes))
    refused(cache, "not those that its index.json was written for")
    (cache / INDEX).unlink()
    with pytest.raises(DamagedShardError, match="holds other documents than its sidecar says"):
        list(one_epoch(ShardStream(cache, batch_size=10, split="val", val_fraction=0.5)))
    assert "other documents" in verify(cache).problems[0]


def test_verify_recomputes_the_documents_from_provenance(tmp_path):
    """A run that is cut in two has the same hash at both starts, which opening alone does not notice."""
    write_cache(tmp_path, n=74, shard_rows=74)
    (tmp_path / INDEX).unlink()
    rows, provenance = make_rows(74)
    changed = provenance.clone()
    changed[36, 0] += 1
    path = tmp_path / shard_name(0, 0)
    torch.save({"rows": {name: value.clone() for name, value in rows.items()}, "provenance": changed}, path)
    forge_sidecar(path)
    assert "rows of other documents than its sidecar says" in verify(tmp_path).problems[0]


@pytest.mark.parametrize("storage", ["exact", "int8"])
@pytest.mark.parametrize("how", ["swap", "copy", "foreign"])
def test_shards_in_the_place_of_others_are_noticed_without_checksums(tmp_path, how, storage):
    write_cache(tmp_path / "acts", n=600, shard_rows=200, storage=storage)
    one, two = (tmp_path / "acts" / shard_name(0, number) for number in (0, 1))
    if how == "foreign":
        with ShardWriter(
            tmp_path / "b", about := manifest(storage=storage, dataset="b"), shard_bytes=200 * about.row_bytes
        ) as writer:
            feed(writer, *make_rows(600, seed=1))
            writer.finish()
        shutil.copy(tmp_path / "b" / two.name, two)
    else:
        before = one.read_bytes()
        shutil.copy(two, one)
        if how == "swap":
            two.write_bytes(before)
    assert len({path.stat().st_size for path in (one, two)}) == 1
    with pytest.raises(DamagedShardError, match="altered outside its numbers, or is another shard"):
        list(one_epoch(ShardStream(tmp_path / "acts", batch_size=100, checksums=False)))
    assert len(verify(tmp_path / "acts").problems) == (2 if how == "swap" else 1)


def test_a_shard_and_its_sidecar_of_another_cache_of_the_same_shape_are_refused(cache, tmp_path):
    write_cache(tmp_path / "b", n=600, shard_rows=200, dataset="b")
    for name in (shard_name(0, 1), SIDECAR):
        shutil.copy(tmp_path / "b" / name, cache / name)
    assert SIDECAR in refused(cache, "belongs to another cache")
    (cache / INDEX).unlink()
    (cache / done_name(0)).unlink()
    with pytest.raises(DamagedShardError, match="belongs to another cache"):
        ShardWriter(cache, manifest())


def test_a_manifest_of_another_cache_is_refused(cache, tmp_path):
    write_cache(tmp_path / "b", n=600, shard_rows=200, dataset="b")
    shutil.copy(tmp_path / "b" / MANIFEST, cache / MANIFEST)
    refused(cache, "belongs to another cache than the manifest.json beside it")


@pytest.mark.parametrize("row", [300, 500])
def test_a_cache_that_would_continue_with_another_row_than_the_next_is_refused(tmp_path, row):
    rows, provenance = make_rows(800)
    with ShardWriter(tmp_path, manifest(), shard_bytes=200 * manifest().row_bytes) as writer:
        feed(writer, rows, provenance, stop=400)
    edit(tmp_path / SIDECAR, lambda sidecar: sidecar["next"].update(row=row, first_row=row))
    for attempt in (lambda: ShardWriter(tmp_path, manifest()), lambda: ShardStream(tmp_path, batch_size=10)):
        with pytest.raises(
            DamagedShardError, match=rf"000001\.json continues with row {row} .* after 400 rows"
        ):
            attempt()
    assert "rows would be missing or written twice" in verify(tmp_path).problems[0]


def test_a_mark_that_counts_other_shards_than_there_are_is_refused(cache):
    (cache / INDEX).unlink()
    edit(cache / done_name(0), lambda mark: mark.update(shards=2, rows=400))
    refused(cache, "counts 2 shards with 400 rows and 0 left out, and there are 3 shards with 600 rows")
    with pytest.raises(DamagedShardError, match="counts 2 shards"):
        ShardWriter(cache, manifest())


def test_verify_reports_every_problem(cache):
    for number, place in ((0, 3000), (2, 4000)):
        content = bytearray((cache / shard_name(0, number)).read_bytes())
        content[place] ^= 1
        (cache / shard_name(0, number)).write_bytes(content)
    (cache / SIDECAR).unlink()
    (cache / done_name(0)).unlink()
    problems = verify(cache).problems
    assert len(problems) == 4
    for name in (shard_name(0, 0), shard_name(0, 2), SIDECAR, done_name(0)):
        assert sum(name in problem for problem in problems) == 1


def test_an_unfinished_cache_is_reported_as_unfinished(cache):
    assert verify(cache).finished
    (cache / INDEX).unlink()
    assert not verify(cache).finished


def test_a_full_shard_has_as_many_rows_as_the_manifest_says_however_often_it_was_saved(tmp_path):
    rows, provenance = make_rows(1000)
    with ShardWriter(tmp_path, manifest(), shard_bytes=300 * manifest().row_bytes) as writer:
        for stop in (60, 130, 1000):
            feed_from(writer, rows, provenance, stop)
            writer.sync()
        writer.finish()
    assert read_manifest(tmp_path).shard_rows == 300
    assert ShardStream(tmp_path, batch_size=10).catalog.stretch_rows == 300


def feed_from(writer, rows, provenance, stop):
    for first in range(0, stop, 10):
        part = slice(first, first + 10)
        writer.append(
            {name: value[part] for name, value in rows.items()},
            provenance[part],
            source=first,
            first_row=first,
        )


@pytest.mark.parametrize("name", [INDEX, SIDECAR, MANIFEST, done_name(0)])
def test_a_json_file_of_many_gigabytes_is_refused_unread(cache, name):
    with (cache / name).open("r+b") as file:
        file.truncate(2**36)
    assert name in refused(cache, r"has 68,719,476,736 bytes, more than any JSON file of a cache")
    if name != INDEX:
        (cache / INDEX).unlink()
    with pytest.raises(ShardError, match="more than any JSON file of a cache"):
        ShardWriter(cache, manifest())


def test_a_subset_of_the_shards_can_be_read_without_the_others(cache):
    for name in (shard_name(0, 0), sidecar_name(shard_name(0, 0)), done_name(0)):
        (cache / name).unlink()
    assert ShardStream(cache / shard_name(0, 1), batch_size=10).rows == 200
