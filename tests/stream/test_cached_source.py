"""A cache as a source of rows: widths, streams, validation rows, normalisation and a fingerprint."""

import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deeplens_lightning.datamodule import ActivationDataModule
from deeplens_lightning.options import BufferOptions
from deeplens_lightning.shards import ShardError, heldout
from deeplens_lightning.shards.format import DTYPES
from deeplens_lightning.stream.cached_source import CachedSettings
from deeplens_lightning.stream.settings import DataSettings
from deeplens_lightning.types import Placement
from tests.support.caches import NARROW, WIDE, make_rows, write_cache

N = 3000
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    write_cache(folder, n=N, shard_rows=700)
    return folder


def settings(cache, **changes):
    return CachedSettings(given=DataSettings(shards=str(cache), **{"val_fraction": 0.2, **changes}))


def opened(cache, rank=0, ranks=1, **changes):
    placement = Placement(rank=rank, ranks=ranks, device=CPU, batch_device=CPU, progress=False)
    return settings(cache, **changes).open(placement)


def test_widths_are_read_from_the_manifest_before_anything_is_opened(cache):
    assert settings(cache).widths == {WIDE: 16, NARROW: 8}
    assert settings(cache, hook=NARROW).widths == {NARROW: 8}
    with pytest.raises(
        ShardError,
        match=rf"hook='layers\.9\.mlp_out' is not in the shards, which hold {WIDE}, {NARROW}; choose",
    ):
        settings(cache, hook="layers.9.mlp_out").check()


def test_one_of_several_hook_points_is_read_alone(cache):
    cached = opened(cache, hook=NARROW, val_fraction=0.0)
    stream = cached.stream(100, cached.measure(), None)
    batch = next(stream.batches(stream.start(), 0))
    assert list(batch.rows) == [NARROW]
    rows, _ = make_rows(N)
    index = batch.provenance[:, 1] * 37 + batch.provenance[:, 2]
    assert torch.equal(batch.rows[NARROW], rows[NARROW][index])


@pytest.mark.parametrize("ranks", [1, 3])
def test_validation_rows_are_dealt_to_the_ranks_and_never_trained_on(cache, ranks):
    hashes = make_rows(N)[1][:, 0].numpy()
    held = int(heldout(hashes, 0.2).sum())
    parts, trained = [], []
    for rank in range(ranks):
        cached = opened(cache, rank, ranks)
        rows, provenance = cached.heldout.rows, cached.heldout.provenance
        assert len(rows[WIDE]) == len(rows[NARROW]) == len(provenance)
        parts.append(provenance)
        stream = cached.stream(64, cached.measure(), None)
        batches = list(stream.batches(stream.start(), 0))
        assert len(batches) == cached.known_batches(64)
        trained += [batch.provenance[:, 0] for batch in batches]
    together = torch.cat(parts)
    assert len(together) == held
    assert len(together.unique(dim=0)) == len(together)
    assert heldout(together[:, 0].numpy(), 0.2).all()
    assert not heldout(torch.cat(trained).numpy(), 0.2).any()


def test_validation_rows_are_limited_to_the_documents_of_lowest_hash(cache):
    provenance = opened(cache, val_rows=3 * 37).heldout.provenance
    hashes = make_rows(N)[1][:, 0].numpy()
    assert set(provenance[:, 0].numpy().view(np.uint64)) == set(np.unique(hashes.view(np.uint64))[:3])


def test_validation_rows_are_limited_in_bytes(cache):
    row = sum(
        kind.d_in * DTYPES[kind.dtype].itemsize for kind in settings(cache).catalog.hook_points.values()
    )
    limited = opened(cache, buffer_options=BufferOptions(val_bytes=50 * row))
    with pytest.warns(UserWarning, match=r"val_bytes=[\d,]+: the validation set keeps at most 50 rows"):
        assert len(limited.heldout) == 50


def test_a_cache_without_held_out_documents_validates_on_nothing(cache, caplog):
    held_out = opened(cache, val_fraction=1e-12).heldout
    assert (held_out.rows[WIDE].shape, len(held_out)) == ((0, 16), 0)
    assert "no held-out documents" in caplog.text


def test_normalisation_is_the_same_on_every_rank(cache):
    one, other = (opened(cache, rank, 2, normalize="zscore").measure() for rank in (0, 1))
    for name in (WIDE, NARROW):
        assert torch.equal(one.scalings[name].scale, other.scalings[name].scale)
        rows = make_rows(N)[0][name]
        hashes = make_rows(N)[1][:, 0].numpy()
        scaled = one.scalings[name].apply(rows[torch.from_numpy(~heldout(hashes, 0.2))].float())
        assert scaled.mean(0).abs().max() < 0.02
        assert (scaled.std(0) - 1).abs().max() < 0.02


def test_the_fingerprint_names_what_differs(cache, tmp_path):
    write_cache(tmp_path, n=N, shard_rows=500)
    one = opened(cache).fingerprint()
    assert one == opened(cache).fingerprint()
    different = opened(tmp_path).fingerprint()
    assert {key for key in one if one[key] != different[key]} == {"shards"}
    assert {key for key in one if one[key] != opened(cache, seed=1).fingerprint()[key]} == {"seed"}


def test_a_cache_has_no_held_out_text(cache):
    assert opened(cache).heldout_blocks(100) is None


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("changes", [{}, {"val_fraction": 0.0}, {"val_fraction": 0.5}, {"hook": NARROW}])
def test_fingerprint_and_length_equal_those_of_a_stream_and_open_none(cache, ranks, changes, monkeypatch):
    cached = opened(cache, 0, ranks, **changes)
    with_stream = []
    for batch_size in (1, 64, 1000):
        stream = cached.stream(batch_size, cached.measure(), None)
        with_stream.append((stream.identity["shards"], stream.steps()))
        stream.close()
    monkeypatch.setattr("deeplens_lightning.stream.cached_source.ShardStream", None)
    again = opened(cache, 0, ranks, **changes)
    found = [(again.fingerprint()["shards"], again.known_batches(size)) for size in (1, 64, 1000)]
    assert found == with_stream


class LiveBytes(TorchDispatchMode):
    """Count the bytes of the tensors that are alive at the same time, without views."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and function._overloadpacket in (
            torch.ops.aten.empty,
            torch.ops.aten.cat,
        ):
            self.add(result.nbytes)
            weakref.finalize(result, self.add, -result.nbytes)
        return result

    def add(self, nbytes):
        self.now += nbytes
        self.most = max(self.most, self.now)


def test_validation_rows_are_allocated_once(tmp_path):
    write_cache(tmp_path, n=60_000, shard_rows=20_000)
    cached = opened(tmp_path, val_fraction=0.9)
    with LiveBytes() as live:
        held_out = cached.heldout
    kept = held_out.provenance.nbytes + sum(rows.nbytes for rows in held_out.rows.values())
    assert len(held_out) > 50_000
    assert kept <= live.most < 1.2 * kept


def test_a_batch_keeps_its_provenance_after_later_batches_and_after_teardown(cache):
    data = ActivationDataModule(shards=str(cache), hook=WIDE, batch_size=500, val_fraction=0.0)
    data.setup("fit")
    batches = list(data.train_dataloader())
    data.teardown("fit")
    rows, provenance = make_rows(N)
    for batch in batches:
        found = data.provenance(batch)
        index = found.document_index * 37 + found.position
        assert torch.equal(batch, rows[WIDE][index])
        assert torch.equal(found.stacked(), provenance[index])
    assert data.provenance(batches[0].clone()) is None
