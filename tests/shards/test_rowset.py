"""Sets of rows and the held-out split: the right rows, in few bytes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deeplens_lightning.shards import heldout
from deeplens_lightning.shards.rowset import BitSet, RunSet, row_set, split_rows

runs = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 30)), min_size=1, max_size=60)


@settings(deadline=None)
@given(gaps=runs)
@pytest.mark.parametrize("kind", [RunSet, BitSet, row_set])
def test_a_row_set_is_the_sorted_list_of_its_rows(kind, gaps):
    starts, at = [], 0
    for gap, length in gaps:
        at += gap
        starts.append(at)
        at += length
    lengths = np.array([length for _, length in gaps])
    listed = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)])
    rows = kind(np.array(starts), lengths)
    assert len(rows) == len(listed)
    assert np.array_equal(rows[np.arange(len(listed))], listed)
    below = np.arange(at + 50)
    assert np.array_equal(rows.count_below(below), np.searchsorted(listed, below))


def test_a_large_bit_set_crosses_its_pieces():
    starts = np.arange(0, 3_000_000, 3)
    lengths = np.ones(len(starts), np.int64)
    rows = row_set(starts, lengths)
    assert isinstance(rows, BitSet)
    assert rows._bytes.nbytes + rows._ends.nbytes < 3_000_000 / 8 * 1.07
    wanted = np.array([0, 1, 349_525, 349_526, 700_000, 999_999])
    assert np.array_equal(rows[wanted], wanted * 3)


def test_whole_documents_take_a_few_bytes():
    """100 000 documents of 300 rows: far below the 3.75 MB of one bit per row."""
    hashes = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 100_000)
    rows = split_rows(hashes, np.full(100_000, 300), 0.05, "train")
    assert isinstance(rows, RunSet)
    assert sum(part.nbytes for part in (rows._ends, rows._shift, rows._starts)) < 0.02 * 30_000_000 / 8 * 2


def test_the_rule_is_hash_below_fraction_of_2_to_the_64():
    hashes = np.array([0, 1, 2**62, -(2**63), -1])  # as unsigned: 0, 1, a quarter, a half, the largest
    assert heldout(hashes, 0.0).tolist() == [False] * 5
    assert heldout(hashes, 0.25).tolist() == [True, True, False, False, False]
    assert heldout(hashes, 0.5).tolist() == [True, True, True, False, False]
    assert heldout(hashes, 1.0).tolist() == [True] * 5
    with pytest.raises(ValueError, match="between 0 and 1"):
        heldout(hashes, 1.5)


@settings(deadline=None)
@given(seed=st.integers(0, 1000), fraction=st.floats(0, 1))
def test_train_and_val_are_disjoint_and_complete_and_never_share_a_document(seed, fraction):
    generator = np.random.default_rng(seed)
    document = generator.integers(0, 20, 50)
    hashes = generator.integers(-(2**63), 2**63 - 1, 20)[document]
    lengths = generator.integers(1, 9, 50)
    train, val = (split_rows(hashes, lengths, fraction, split) for split in ("train", "val"))
    of_row = np.repeat(document, lengths)
    kept, held = train[np.arange(len(train))], val[np.arange(len(val))]
    assert sorted([*kept, *held]) == list(range(lengths.sum()))
    assert not set(of_row[kept]) & set(of_row[held])


def test_max_rows_keeps_the_documents_of_the_lowest_hashes():
    hashes = np.array([50, -1, 10, 30, 10])
    lengths = np.array([4, 4, 4, 4, 4])
    rows = split_rows(hashes, lengths, 1.0, "val", max_rows=10)
    assert rows[np.arange(10)].tolist() == [8, 9, 10, 11, 12, 13, 16, 17, 18, 19]
    assert len(split_rows(hashes, lengths, 1.0, "val", max_rows=1000)) == 20
