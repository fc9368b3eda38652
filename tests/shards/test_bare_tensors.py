"""Bare tensors: damage is found by the CRCs in their files, and what cannot be read right is refused."""

import pytest
import torch

from deeplens_lightning.shards import DamagedShardError, ShardError, ShardStream, verify
from deeplens_lightning.shards.names import INDEX, shard_name
from tests.support.caches import NARROW, WIDE, forge_sidecar, one_epoch, write_cache


def bare(tmp_path, rows):
    torch.save(rows, tmp_path / "x.pt")
    return tmp_path / "x.pt"


def test_flipped_bytes_of_a_bare_tensor_are_found_by_its_crc(tmp_path):
    path = bare(tmp_path, torch.randn(100, 8))
    content = bytearray(path.read_bytes())
    content[1500] ^= 1
    path.write_bytes(content)
    assert len(list(one_epoch(ShardStream(path, batch_size=100)))) == 1
    with pytest.raises(DamagedShardError, match=r"x\.pt is altered: Bad CRC-32 for file"):
        list(one_epoch(ShardStream(path, batch_size=100, checksums=True)))
    assert "Bad CRC-32" in verify(path).problems[0]


@pytest.mark.parametrize("checksums", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_in_a_bare_tensor_is_never_served(tmp_path, checksums, dtype):
    rows = torch.randn(100, 8).to(dtype)
    rows[57, 3] = float("nan")
    stream = ShardStream(bare(tmp_path, rows), batch_size=20, shuffle="none", checksums=checksums)
    match = r"x\.pt holds NaN or infinity in " + ("1 of 100 rows" if checksums else "row 57")
    with pytest.raises(DamagedShardError, match=match):
        list(one_epoch(stream))


def test_large_finite_rows_of_a_bare_tensor_are_served(tmp_path):
    path = bare(tmp_path, torch.full((10, 8), 3e38))
    assert len(list(one_epoch(ShardStream(path, batch_size=10)))) == 1


@pytest.mark.parametrize("name", ["train.py", "rows.safetensors", "rows.npy", "rows.pth", "rows"])
@pytest.mark.parametrize(
    "given", [str, lambda path: path, lambda path: [str(path)]], ids=["str", "Path", "list"]
)
def test_a_file_that_is_no_pt_file_is_named(tmp_path, name, given):
    path = tmp_path / name
    path.write_bytes(b"import this")
    with pytest.raises(
        ShardError, match=rf"{name} is a file that does not end in \.pt: give a folder .* tensor"
    ):
        ShardStream(given(path), batch_size=1)


UNUSUAL = {
    "expanded": (torch.zeros(1, 3).expand(10**13, 3), "only 12 bytes of it"),
    "expanded columns": (torch.zeros(30, 1).expand(30, 10**12), "only 120 bytes of it"),
    "negated view": (torch._neg_view(torch.ones(3, 2)), "negated view"),
    "meta": (torch.zeros(3, 2, device="meta"), "on the device meta"),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.zeros(3, 2), torch.zeros(2, 2)], layout=torch.jagged),
        "not a plain one",
    ),
}


@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_unusual_bare_tensors_are_refused_in_one_sentence(tmp_path, kind):
    rows, match = UNUSUAL[kind]
    with pytest.raises(ShardError, match=match):
        ShardStream(bare(tmp_path, rows() if callable(rows) else rows), batch_size=1)


@pytest.mark.parametrize(
    "rows",
    [
        torch.nn.Parameter(torch.arange(60.0).reshape(20, 3)),
        torch.arange(60.0).reshape(3, 20).t(),
        torch.arange(120.0).reshape(20, 6)[:, 1:4],
        torch.arange(120.0).reshape(40, 3)[::2],
    ],
    ids=["requires grad", "transposed", "columns", "every second row"],
)
def test_views_and_parameters_are_read_right(tmp_path, rows):
    path = bare(tmp_path, rows)
    for checksums in (False, True):
        [served] = one_epoch(ShardStream(path, batch_size=20, shuffle="none", checksums=checksums))
        assert torch.equal(served.rows["activations"], rows.detach())
    assert verify(path).problems == []


def test_a_shard_whose_tensors_require_grad_is_read_without_grad(tmp_path):
    cache = tmp_path / "acts"
    write_cache(cache, n=600, shard_rows=200)
    (cache / INDEX).unlink()
    path = cache / shard_name(0, 1)
    content = torch.load(path, weights_only=True)
    content["rows"] = {name: rows.requires_grad_() for name, rows in content["rows"].items()}
    torch.save(content, path)
    forge_sidecar(path)
    batches = list(one_epoch(ShardStream(cache, batch_size=100)))
    assert {name for batch in batches for name, rows in batch.rows.items() if not rows.requires_grad} == {
        WIDE,
        NARROW,
    }
