"""`JoinedRows` and `JoinedShards`: rows of many tensors, whatever their layout, gathered as from one."""

import numpy as np
import pytest
import torch

from deeplens_lightning.shards import ShardStream, ShardWriter
from deeplens_lightning.shards.joined import JoinedRows
from tests.support.caches import NARROW, WIDE, feed, make_rows, manifest, one_epoch


def taken(tensors, width, seed=0):
    """Random rows by `JoinedRows`, and the same rows one by one."""
    generator = np.random.default_rng(seed)
    numbers = generator.choice(sorted(tensors), 500)
    rows = np.array([generator.integers(len(tensors[number])) for number in numbers])
    out = torch.empty(500, width, dtype=next(iter(tensors.values())).dtype)
    assert JoinedRows(tensors).take(numbers, rows, out) is out
    one_by_one = [tensors[number][row] for number, row in zip(numbers.tolist(), rows.tolist(), strict=True)]
    return out, torch.stack(one_by_one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.int64])
@pytest.mark.parametrize("width", [1, 3, 8, 257])
def test_rows_of_any_width_and_dtype_equal_those_taken_one_by_one(dtype, width):
    tensors = {number: torch.randn(5 + 3 * number, width).mul(50).to(dtype) for number in (0, 1, 4)}
    out, expected = taken(tensors, width)
    assert torch.equal(out, expected)


def test_rows_of_any_layout_equal_those_taken_one_by_one():
    memory = torch.randn(4000)
    tensors = {
        0: memory[1:1001].view(100, 10),
        1: torch.randn(10, 30).T,
        2: torch.randn(1, 10).expand(50, 10),
        3: torch.randn(40, 25)[:, 5:15],
        4: torch.randn(80, 10)[::2],
        5: memory[3001:3011].view(1, 10),
    }
    out, expected = taken(tensors, 10)
    assert torch.equal(out, expected)


def test_an_address_that_no_element_fits_on_is_read():
    """A file that was packed again by other software may begin its rows anywhere."""
    memory = torch.zeros(4 * 6 * 10 + 3, dtype=torch.uint8)
    odd = torch.frombuffer(memory.numpy(), dtype=torch.float32, offset=3, count=60).view(10, 6)
    odd.copy_(torch.randn(10, 6))
    out, expected = taken({0: odd, 1: torch.randn(20, 6)}, 6)
    assert torch.equal(out, expected)


def test_tensors_that_differ_are_refused():
    with pytest.raises(ValueError, match="tensors of one dtype and width can be joined, got"):
        JoinedRows({0: torch.zeros(3, 4), 1: torch.zeros(3, 5)})


def test_caches_of_different_storage_are_read_together(tmp_path):
    rows, provenance = make_rows(2000)
    for name, part, storage in (("a", slice(0, 900), "exact"), ("b", slice(900, None), "int8")):
        with ShardWriter(tmp_path / name, manifest(storage=storage), shard_bytes=20_000) as writer:
            feed(writer, {hook: x[part] for hook, x in rows.items()}, provenance[part])
            writer.finish()
    both = ShardStream([tmp_path / "a", tmp_path / "b"], batch_size=300)
    served = list(one_epoch(both))
    for batch in served:
        index = batch.provenance[:, 1] * 37 + batch.provenance[:, 2]
        assert torch.equal(provenance[index], batch.provenance)
        exact = index < 900
        for hook in (WIDE, NARROW):
            assert batch.rows[hook].dtype == rows[hook].dtype
            assert torch.equal(batch.rows[hook][exact], rows[hook][index][exact])
            torch.testing.assert_close(batch.rows[hook].float(), rows[hook][index].float(), atol=0.06, rtol=0)
    assert sum(len(batch.provenance) for batch in served) == 2000


@pytest.mark.parametrize("row", [3, -1, 2**40])
def test_a_row_beyond_its_tensor_is_refused(row):
    joined = JoinedRows({0: torch.zeros(3, 4), 1: torch.zeros(5, 4)})
    with pytest.raises(IndexError, match="beyond the rows"):
        joined.take(np.array([1, 0]), np.array([4, row]), torch.empty(2, 4))
