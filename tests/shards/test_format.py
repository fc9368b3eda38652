"""File formats of a cache: their content, and files that are refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from deeplens_lightning.shards import (
    DamagedShardError,
    Manifest,
    OtherConfigError,
    Rows,
    ShardError,
    ShardStream,
)
from deeplens_lightning.shards.codec import dequantize, quantize
from deeplens_lightning.shards.format import VERSION, Resume
from deeplens_lightning.shards.frame import Frame
from deeplens_lightning.shards.names import MANIFEST, shard_name, sidecar_name
from deeplens_lightning.shards.sidecar import Documents, Sidecar
from tests.support.caches import NARROW, WIDE, edit, make_rows, manifest, write_cache


def test_a_shard_opens_with_plain_torch_load_and_holds_rows_beside_provenance(tmp_path):
    write_cache(tmp_path, n=1000, shard_rows=600)
    rows, provenance = make_rows(1000)
    shard = torch.load(tmp_path / shard_name(0, 1), mmap=True, weights_only=True)
    assert torch.equal(shard["rows"][WIDE], rows[WIDE][600:])
    assert torch.equal(shard["rows"][NARROW], rows[NARROW][600:])
    assert shard["rows"][NARROW].dtype == torch.bfloat16
    assert torch.equal(shard["provenance"], provenance[600:])


def test_the_json_files_of_a_cache_are_indented_text(tmp_path):
    write_cache(tmp_path, n=1000, shard_rows=600)
    text = json.loads((tmp_path / MANIFEST).read_text())
    assert text["format"] == "deeplens-lightning shards"
    assert text["hook_points"][WIDE] == {"d_in": 16, "dtype": "float32"}
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["rows"] == 1000
    assert [shard["rows"] for shard in index["shards"]] == [600, 400]


def test_the_sidecar_has_the_checksum_that_sha256sum_prints(tmp_path):
    import hashlib

    write_cache(tmp_path, n=500)
    sidecar = json.loads((tmp_path / sidecar_name(shard_name(0, 0))).read_text())
    content = (tmp_path / shard_name(0, 0)).read_bytes()
    assert sidecar["sha256"] == hashlib.sha256(content).hexdigest()
    assert sidecar["nbytes"] == len(content)


def test_sidecar_and_manifest_survive_a_round_trip():
    sidecar = Sidecar(
        file=shard_name(3, 5),
        rows=7,
        nbytes=100,
        sha256="ab" * 32,
        manifest=manifest().identity,
        frame=Frame(payloads=((64, 20), (128, 10)), sha256="cd" * 32),
        next=Resume({"epoch": 1}, 40, 47),
        dropped=2,
        documents=Documents.of(np.array([[-5, 0, 0, 0]] * 3 + [[2**62, 1, 0, 0]] * 4)),
    )
    assert Sidecar.parse(sidecar.dump(), "here") == sidecar
    assert [part.tolist() for part in sidecar.documents.arrays()] == [[-5, 2**62], [3, 4]]
    first = manifest()
    assert Manifest.parse(first.dump(), "here").comparable() == first.comparable()


def test_another_configuration_is_refused_with_every_difference_named():
    there = manifest(dataset="fineweb")
    here = Manifest(
        hook_points={WIDE: Rows(d_in=16, dtype="float32")}, config={"packing": {"seq_length": 64}}
    )
    with pytest.raises(OtherConfigError) as caught:
        here.check_same(there, "acts")
    message = str(caught.value)
    assert "config.packing.seq_length: 37 there, 64 here" in message
    assert "config.dataset: 'fineweb' there, None here" in message
    assert f"hook_points.{NARROW}" in message


def test_library_versions_and_extra_do_not_make_another_cache():
    one = manifest()
    other = replace(one, versions={"torch": "9"}, extra={"scale": [1.5]})
    one.check_same(other, "acts")


def test_a_newer_format_says_to_upgrade(tmp_path):
    write_cache(tmp_path, n=100)
    path = tmp_path / MANIFEST
    edit(path, lambda content: content.update(version=VERSION + 1))
    with pytest.raises(
        ShardError, match=rf"format version {VERSION + 1}.*pip install --upgrade deeplens-lightning"
    ):
        ShardStream(tmp_path, batch_size=10)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"version": 1}', '{"format": "other", "version": 1}', "\x00\xff"]
)
def test_a_manifest_that_is_none_is_refused(tmp_path, text):
    write_cache(tmp_path, n=100)
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(ShardError, match=r"manifest\.json"):
        ShardStream(tmp_path, batch_size=10)


@pytest.mark.parametrize(
    "name", ["../secret.pt", "/etc/passwd", "a/rank00000-000000.pt", "rank00000-000000.pt\n", 3]
)
@pytest.mark.parametrize("place", ["index", "sidecar"])
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path, name, place):
    write_cache(tmp_path / "acts", n=100)
    torch.save(torch.zeros(3, 2), tmp_path / "secret.pt")
    path = tmp_path / "acts" / ("index.json" if place == "index" else sidecar_name(shard_name(0, 0)))
    edit(path, lambda content: (content["shards"][0] if place == "index" else content).update(file=name))
    with pytest.raises(DamagedShardError, match=r"file is .*, expected"):
        ShardStream(tmp_path / "acts", batch_size=10)


def test_a_sidecar_that_contradicts_itself_is_refused(tmp_path):
    write_cache(tmp_path, n=100)
    path = tmp_path / sidecar_name(shard_name(0, 0))
    edit(path, lambda content: content.update(rows=90))
    with pytest.raises(DamagedShardError, match="do not add up"):
        ShardStream(tmp_path, batch_size=10)


def test_rows_need_a_known_dtype_and_width():
    with pytest.raises(ShardError, match="float64"):
        Rows(d_in=4, dtype="float64")
    with pytest.raises(ShardError, match="d_in"):
        Rows(d_in=0, dtype="float32")
    with pytest.raises(ShardError, match="exact, int8"):
        Manifest(hook_points={"a": Rows(d_in=4, dtype="float32")}, storage="int4")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_8_bits_keep_each_element_within_its_rows_largest_over_254(dtype):
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn(200, 64, generator=generator) * torch.logspace(-3, 3, 200).unsqueeze(1)).to(dtype)
    rows[3] = 0
    codes, scales = quantize(rows)
    back = dequantize(codes, scales, torch.float32)
    bound = rows.float().abs().amax(dim=1, keepdim=True) / 254
    assert ((back - rows.float()).abs() <= bound * 1.001).all()
    assert (back[3] == 0).all()
    ratio = (back - rows.float()).norm() / rows.float().norm()
    assert ratio < 0.01
