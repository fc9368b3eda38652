"""What a data module needs of shards: widths, streams, validation rows, normalisation, a fingerprint."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "shards"))

from deeplens_lightning.shards import ShardError, heldout
from deeplens_lightning.stream.cached_source import CachedActivations
from deeplens_lightning.types import Placement
from tests.support.making_shards import NARROW, WIDE, make_rows, write_cache

N = 3000
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    write_cache(folder, n=N, shard_rows=700)
    return folder


def opened(cache, rank=0, ranks=1, **kwargs):
    cached = CachedActivations(shards=cache, **{"val_fraction": 0.2, **kwargs})
    cached.open(Placement(rank=rank, ranks=ranks, device=CPU, batch_device=CPU, progress=False))
    return cached


def test_widths_are_known_before_anything_is_opened(cache):
    assert CachedActivations(shards=cache).widths == {WIDE: 16, NARROW: 8}
    assert CachedActivations(shards=cache, only=[NARROW]).widths == {NARROW: 8}
    with pytest.raises(ShardError, match=r"not layers\.9\.mlp_out: choose among those"):
        CachedActivations(shards=cache, only=["layers.9.mlp_out"]).check()


def test_one_of_several_hook_points_is_read_alone(cache):
    cached = opened(cache, only=[NARROW], val_fraction=0.0)
    stream = cached.stream(100, cached.measure("none", None), None)
    batch = next(stream.batches(None, 0))
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
        rows, provenance = cached.heldout_rows()
        assert len(rows[WIDE]) == len(rows[NARROW]) == len(provenance)
        parts.append(provenance)
        stream = cached.stream(64, cached.measure("none", None), None)
        batches = list(stream.batches(None, 0))
        assert len(batches) == cached.known_batches(64)
        trained += [batch.provenance[:, 0] for batch in batches]
    together = torch.cat(parts)
    assert len(together) == held - held % ranks
    assert len(together.unique(dim=0)) == len(together)
    assert heldout(together[:, 0].numpy(), 0.2).all()
    assert not heldout(torch.cat(trained).numpy(), 0.2).any()


def test_validation_rows_are_limited_to_the_documents_of_lowest_hash(cache):
    _, provenance = opened(cache, val_rows=3 * 37).heldout_rows()
    hashes = make_rows(N)[1][:, 0].numpy()
    assert set(provenance[:, 0].numpy().view(np.uint64)) == set(np.unique(hashes.view(np.uint64))[:3])


def test_a_cache_without_held_out_documents_validates_on_nothing(cache, caplog):
    rows, provenance = opened(cache, val_fraction=1e-12).heldout_rows()
    assert (rows[WIDE].shape, len(provenance)) == ((0, 16), 0)
    assert "no held-out documents" in caplog.text


def test_normalisation_is_the_same_on_every_rank(cache):
    one, other = (opened(cache, rank, 2).measure("zscore", None) for rank in (0, 1))
    for name in (WIDE, NARROW):
        assert torch.equal(one.scalings[name].scale, other.scalings[name].scale)
        rows = make_rows(N)[0][name]
        hashes = make_rows(N)[1][:, 0].numpy()
        scaled = one.scalings[name].apply(rows[torch.from_numpy(~heldout(hashes, 0.2))].float())
        assert scaled.mean(0).abs().max() < 0.02
        assert (scaled.std(0) - 1).abs().max() < 0.02
    with pytest.raises(ValueError, match="max_norm_ratio filters live activations"):
        opened(cache).measure("none", 3.0)


def test_the_fingerprint_names_what_differs(cache, tmp_path):
    write_cache(tmp_path, n=N, shard_rows=500)
    one = opened(cache).fingerprint()
    assert one == opened(cache).fingerprint()
    different = opened(tmp_path).fingerprint()
    assert {key for key in one if one[key] != different[key]} == {"shards"}
    assert {key for key in one if one[key] != opened(cache, seed=1).fingerprint()[key]} == {"seed"}


def test_there_are_no_blocks_of_text(cache):
    assert opened(cache).heldout_blocks(100) is None
