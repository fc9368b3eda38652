"""Damaged, foreign and hostile files: refused with the file's name and the fix; no code in them is executed."""

import hashlib
import os
import pickle
import zipfile
from contextlib import suppress

import pytest
import torch

from deeplens_lightning.shards import DamagedShardError, Rows, ShardError, ShardStream, ShardWriter, verify
from deeplens_lightning.shards.checksum import sha256_of
from deeplens_lightning.shards.index import digest_of_sidecars
from deeplens_lightning.shards.names import INDEX, MANIFEST, done_name, shard_name, sidecar_name
from tests.support.caches import NARROW, WIDE, edit, manifest, one_epoch, read_manifest, write_cache


@pytest.fixture
def cache(tmp_path):
    write_cache(tmp_path / "acts", n=500, shard_rows=200)
    return tmp_path / "acts"


def read_all(paths, **kwargs):
    return list(one_epoch(ShardStream(paths, batch_size=100, **kwargs)))


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_truncated_shard_is_named_before_anything_is_read(cache):
    path = cache / shard_name(0, 1)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        DamagedShardError, match=r"000001\.pt has .* bytes, its sidecar says .* Copy it again, or delete"
    ):
        ShardStream(cache, batch_size=10)
    assert "000001.pt" in verify(cache).problems[0]


def test_a_flipped_byte_is_found_by_verify_and_by_reading_with_checksums(cache):
    flip(cache / shard_name(0, 1), 5000)
    assert len(read_all(cache)) == 5
    [problem] = verify(cache).problems
    assert "000001.pt is altered" in problem
    with pytest.raises(DamagedShardError, match=r"000001\.pt is altered: its checksum is"):
        read_all(cache, checksums=True)


def test_a_byte_flipped_in_the_description_of_the_tensors_is_a_damaged_shard(cache):
    """A DamagedShardError, not one of the many errors that pickle can raise."""
    path = cache / shard_name(0, 0)
    with zipfile.ZipFile(path) as archive:
        [info] = [info for info in archive.infolist() if info.filename.endswith("data.pkl")]
    start = info.header_offset + 30 + len(info.filename)
    whole = path.read_bytes()
    for place in range(start, start + info.file_size + 64, 3):
        flip(path, place)
        with suppress(DamagedShardError):
            read_all(cache)
        path.write_bytes(whole)


@pytest.mark.parametrize("what", ["shard", "sidecar"])
def test_a_missing_file_is_named(cache, what):
    name = shard_name(0, 1) if what == "shard" else sidecar_name(shard_name(0, 1))
    (cache / name).unlink()
    with pytest.raises(DamagedShardError, match=f"{name} is missing: copy it again from where"):
        ShardStream(cache, batch_size=10)


def test_a_missing_shard_shows_in_an_unfinished_cache_too(cache):
    for name in (INDEX, shard_name(0, 1), sidecar_name(shard_name(0, 1))):
        (cache / name).unlink()
    with pytest.raises(DamagedShardError, match=r"000001\.pt is missing and rank00000-000002\.pt is there"):
        ShardStream(cache, batch_size=10)


def test_an_unfinished_cache_is_read_up_to_its_last_shard_with_a_warning(cache, caplog):
    for name in (INDEX, done_name(0), sidecar_name(shard_name(0, 2))):
        (cache / name).unlink()
    assert sum(len(batch.provenance) for batch in read_all(cache)) == 400
    assert (
        "is not finished: reading its 2 finished shards; run the command that wrote it again" in caplog.text
    )


def test_shards_swapped_between_caches_are_noticed(tmp_path):
    write_cache(tmp_path / "a", n=500, shard_rows=200)
    wide = {WIDE: Rows(d_in=16, dtype="float32"), NARROW: Rows(d_in=64, dtype="bfloat16")}
    manifest_path = tmp_path / "a" / MANIFEST
    edit(manifest_path, lambda content: content["hook_points"][NARROW].update(d_in=wide[NARROW].d_in))
    with pytest.raises(DamagedShardError, match="belongs to another cache"):
        ShardStream(tmp_path / "a", batch_size=10)


def test_a_shard_of_another_layout_and_the_same_size_is_noticed_when_read(cache):
    edit(cache / MANIFEST, lambda content: content["hook_points"][NARROW].update(dtype="float16"))
    for number in range(3):
        path = cache / sidecar_name(shard_name(0, number))
        edit(path, lambda content: content.update(manifest=read_manifest(cache).identity))
    (cache / INDEX).unlink()
    (cache / done_name(0)).unlink()
    with pytest.raises(
        DamagedShardError, match=r"is torch.bfloat16 \(200, 8\), its manifest says torch.float16"
    ):
        read_all(cache)


def test_folders_of_different_hook_points_or_models_do_not_mix(tmp_path):
    write_cache(tmp_path / "a", n=100)
    write_cache(tmp_path / "b", n=100, model={"name": "other"})
    torch.save(torch.zeros(10, 3), tmp_path / "bare.pt")
    with pytest.raises(ShardError, match="come from different models: name is 'other' and 'random'"):
        ShardStream([tmp_path / "a", tmp_path / "b"], batch_size=10)
    with pytest.raises(ShardError, match=r"bare\.pt holds activations \(3 wide, float32\), .* holds layers"):
        ShardStream([tmp_path / "a", tmp_path / "bare.pt"], batch_size=10)


@pytest.mark.parametrize("other", [torch.zeros(10, 4), torch.zeros(10, 3).bfloat16()])
def test_bare_files_of_different_width_or_dtype_do_not_mix(tmp_path, other):
    torch.save(torch.zeros(10, 3), tmp_path / "a.pt")
    torch.save(other, tmp_path / "b.pt")
    with pytest.raises(ShardError, match=r"b\.pt holds .* a\.pt holds .* one hook point, d_in and dtype"):
        ShardStream(tmp_path, batch_size=10)


FOREIGN = {
    "checkpoint": (
        {"state_dict": {"w": torch.zeros(3)}, "epoch": 3},
        r"dict with keys 'state_dict', 'epoch' \(a model",
    ),
    "list": ([torch.zeros(3, 2)], "a list"),
    "vector": (torch.zeros(3), r"shape \(3,\), expected \(rows, d_in\)"),
    "batch": (torch.zeros(3, 4, 5), r"save `x.reshape\(-1, x.shape\[-1\]\)`"),
    "empty": (torch.zeros(0, 5), "at least one row"),
    "double": (torch.zeros(3, 5).double(), r"save `x.float\(\)`"),
    "tokens": (torch.zeros(3, 5).long(), r"torch.int64, expected float32"),
    "sparse": (torch.eye(3).to_sparse(), r"not a plain one \(sparse_coo"),
    "number": (3, "a int"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_refused_with_what_it_holds(tmp_path, kind):
    content, message = FOREIGN[kind]
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ShardError, match=message):
        ShardStream(tmp_path / "x.pt", batch_size=1)


def test_a_file_that_is_no_torch_file_is_refused(tmp_path):
    for content in (b"", b"hello", os.urandom(1000), b"PK\x03\x04" + bytes(100)):
        (tmp_path / "x.pt").write_bytes(content)
        with pytest.raises(DamagedShardError, match=r"x\.pt"):
            ShardStream(tmp_path / "x.pt", batch_size=1)


def test_the_legacy_torch_format_says_how_to_convert_it(tmp_path):
    torch.save(torch.zeros(3, 2), tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(DamagedShardError, match="legacy format"):
        ShardStream(tmp_path / "x.pt", batch_size=1)


class Bomb:
    """Runs a command when it is unpickled without care."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def _bombs(mark):
    yield "bare", Bomb(mark)
    yield "in a list", [torch.zeros(3, 2), Bomb(mark)]
    yield (
        "as rows",
        {"rows": {WIDE: Bomb(mark), NARROW: torch.zeros(200, 8)}, "provenance": torch.zeros(200, 4)},
    )
    yield "as provenance", {"rows": {}, "provenance": Bomb(mark)}


def forge(cache, shard):
    """Make the sidecar and the index of a cache agree with what its shard 1 holds now."""
    rows = 200 * manifest().row_bytes
    frame = {"payloads": [[0, rows]], "sha256": hashlib.sha256(shard.read_bytes()[rows:]).hexdigest()}
    entry = {"nbytes": shard.stat().st_size, "sha256": sha256_of(shard)}
    edit(cache / sidecar_name(shard.name), lambda content: content.update(entry, frame=frame))

    def change(index):
        index["shards"][1].update(entry)
        index["nbytes"] = sum(each["nbytes"] for each in index["shards"])
        sidecars = [(cache / sidecar_name(each["file"])).read_bytes() for each in index["shards"]]
        index["sidecars"] = digest_of_sidecars(sidecars)

    edit(cache / INDEX, change)


def test_a_pickle_that_would_run_code_is_refused_wherever_a_file_is_read_and_nothing_runs(cache, tmp_path):
    mark = tmp_path / "executed"
    folder = tmp_path / "hostile"
    folder.mkdir()
    for name, bomb in _bombs(mark):
        torch.save(bomb, folder / "x.pt")
        for path in (folder, folder / "x.pt", str(folder / "*.pt")):
            with pytest.raises(DamagedShardError, match="nothing in it was executed"):
                ShardStream(path, batch_size=1)
        assert "nothing in it was executed" in verify(folder).problems[0], name

        # In a cache whose sidecar and index were forged to match, so that only opening it shows the damage.
        shard = cache / shard_name(0, 1)
        torch.save([bomb, torch.zeros(shard.stat().st_size, dtype=torch.uint8)], shard)
        forge(cache, shard)
        with pytest.raises(DamagedShardError, match="nothing in it was executed"):
            read_all(cache, checksums=True)
        assert "nothing in it was executed" in verify(cache).problems[0]
    for protocol in (2, 4):
        (folder / "x.pt").write_bytes(pickle.dumps(Bomb(mark), protocol=protocol))
        with pytest.raises(DamagedShardError):
            ShardStream(folder, batch_size=1)
    for name in (MANIFEST, INDEX, sidecar_name(shard_name(0, 1))):
        before = (cache / name).read_bytes()
        (cache / name).write_bytes(pickle.dumps(Bomb(mark)))
        with pytest.raises(ShardError):
            ShardStream(cache, batch_size=1)
        with suppress(ShardError):  # a complete cache is left alone without reading its sidecars
            ShardWriter(cache, manifest()).close()
        (cache / name).write_bytes(before)
    assert not mark.exists()
    os.mkdir(mark)  # noqa: PTH102
    assert mark.exists()


def test_nan_in_a_bare_tensor_is_found_by_verify(tmp_path):
    rows = torch.zeros(30, 2)
    rows[7, 1] = float("nan")
    torch.save(rows, tmp_path / "x.pt")
    assert "NaN or infinity in 1 of 30 rows" in verify(tmp_path).problems[0]


def test_deeplens_files_are_read_as_they_are(tmp_path):
    rows = torch.randn(25_000, 12, generator=torch.Generator().manual_seed(0))
    torch.save(rows, tmp_path / "features_layer_3_25000.pt")
    train, val = (
        ShardStream(tmp_path / "features_layer_3_25000.pt", batch_size=500, split=split, val_fraction=0.1)
        for split in ("train", "val")
    )
    assert list(train.hook_points) == ["layers.3.mlp_act"]
    assert train.d_in == {"layers.3.mlp_act": 12}
    assert abs(val.rows - 2500) <= 200
    assert train.rows + val.rows == 25_000
    served = torch.cat([b.rows["layers.3.mlp_act"] for s in (train, val) for b in one_epoch(s)])
    assert torch.equal(served[:, 0].sort().values, rows[:, 0].sort().values)
    assert (next(one_epoch(train)).provenance == -1).all()
    named = ShardStream(tmp_path, batch_size=500, hook="layers.3.mlp_out")
    assert list(named.hook_points) == ["layers.3.mlp_out"]


def test_bare_rows_held_out_are_stretches_of_neighbours_spread_over_the_file(tmp_path):
    torch.save(torch.arange(20_000.0).unsqueeze(1), tmp_path / "x.pt")
    stream = ShardStream(tmp_path, batch_size=20_000, split="val", val_fraction=0.05, shuffle="none")
    [served] = one_epoch(stream)
    rows = served.rows["activations"][:, 0].long()
    breaks = int((rows.diff() != 1).sum()) + 1
    assert breaks <= 14
    assert rows.min() < 4000
    assert rows.max() > 16_000


def test_a_writer_refuses_a_folder_of_pt_files_without_a_manifest(cache):
    (cache / MANIFEST).unlink()
    with pytest.raises(ShardError, match=r"has \.pt files and no manifest\.json"):
        ShardWriter(cache, manifest())
