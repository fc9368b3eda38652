"""The seeded permutation is complete, deterministic and well shuffled."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deeplens_lightning.permutation import MAX_LENGTH, Permutation


def permutation(n: int, seed: int = 0) -> Permutation:
    return Permutation(n, np.random.SeedSequence(seed))


@settings(deadline=None)
@given(n=st.integers(1, 5000), seed=st.integers(0, 2**64))
def test_every_value_occurs_exactly_once(n, seed):
    assert np.array_equal(np.sort(permutation(n, seed)[np.arange(n)]), np.arange(n))


@pytest.mark.parametrize("n", [*range(1, 70), 2**16 - 1, 2**16, 2**16 + 1, 999_983])
def test_sizes_around_squares_and_powers_of_two_are_complete(n):
    assert np.array_equal(np.sort(permutation(n)[np.arange(n)]), np.arange(n))


@settings(deadline=None)
@given(n=st.integers(10**6, MAX_LENGTH), seed=st.integers(0, 2**64), data=st.data())
def test_large_sizes_stay_in_range_and_never_collide(n, seed, data):
    positions = np.unique(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=300)))
    values = permutation(n, seed)[positions]
    assert values.dtype == np.int64
    assert values.min() >= 0
    assert values.max() < n
    assert len(np.unique(values)) == len(positions)


def test_no_collision_among_a_million_positions_of_the_largest_size():
    values = permutation(MAX_LENGTH)[np.arange(10**6)]
    assert len(np.unique(values)) == 10**6


def test_the_order_never_changes_between_versions():
    """Caches and checkpoints depend on the order: with another one, rows would be served twice after a resume."""
    assert permutation(10)[np.arange(10)].tolist() == [3, 4, 5, 9, 6, 1, 0, 7, 8, 2]
    assert permutation(10**9, 7)[np.array([0, 1, 2, 10**9 - 1])].tolist() == [
        606994095,
        483591020,
        519705956,
        283840474,
    ]
    assert permutation(MAX_LENGTH, 7)[np.array([0, 2**39, 2**40 - 1])].tolist() == [
        479903719002,
        244770339473,
        963533970251,
    ]


def test_one_position_agrees_with_an_array_and_keeps_shapes():
    order = permutation(100)
    whole = order[np.arange(100).reshape(4, 25)]
    assert whole.shape == (4, 25)
    assert [order[i] for i in range(100)] == whole.reshape(-1).tolist()
    assert isinstance(order[3], int)
    assert order[np.array([], dtype=np.int64)].shape == (0,)
    assert len(order) == 100


@pytest.mark.parametrize("n", [1, 2, 3, 7, 100, 1024, 1025, 5000, 250_001, 10**6, 2**30])
def test_positions_looked_up_one_by_one_and_in_thousands_agree(n):
    """After many look-ups the values come from tables."""
    positions = np.unique(np.random.default_rng(0).integers(0, n, 40_000))
    order = permutation(n, 3)
    assert np.array_equal(order[positions], order[positions])
    assert order[positions[:300]].tolist() == [permutation(n, 3)[i] for i in positions[:300].tolist()]


def test_seeds_give_different_orders():
    orders = {tuple(permutation(50, seed)[np.arange(50)].tolist()) for seed in range(200)}
    assert len(orders) == 200


@pytest.mark.parametrize("n", [3, 4, 5])
def test_small_sizes_reach_every_order_evenly(n):
    """Chi-square of 6000 seeds over the n! orders, against five standard deviations."""
    orders = np.array([permutation(n, seed)[np.arange(n)] for seed in range(6000)])
    _, counts = np.unique(orders, axis=0, return_counts=True)
    cells = int(np.prod(np.arange(1, n + 1)))
    expected = 6000 / cells
    chi_square = ((counts - expected) ** 2).sum() / expected + (cells - len(counts)) * expected
    assert chi_square < cells - 1 + 5 * (2 * (cells - 1)) ** 0.5


@pytest.mark.parametrize("n", [1000, 1024, 100_003])
def test_positions_and_values_are_uncorrelated(n):
    """As in a uniform permutation: no correlation with the position, between neighbours, or of parity."""
    for seed in range(20):
        values = permutation(n, seed)[np.arange(n)]
        bound = 5 / n**0.5
        assert abs(np.corrcoef(np.arange(n), values)[0, 1]) < bound
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < bound
        assert abs((values[:-1] % 2 == values[1:] % 2).mean() - 0.5) < bound


def test_a_batch_is_spread_over_the_whole_range():
    """Chi-square of one batch over 64 equal parts of the range, for many batches."""
    n, batch = 10**8, 4096
    order = permutation(n)
    for start in range(0, 50 * batch, batch):
        counts = np.bincount(order[np.arange(start, start + batch)] * 64 // n, minlength=64)
        assert ((counts - 64) ** 2).sum() / 64 < 63 + 6 * (2 * 63) ** 0.5


def test_memory_does_not_grow_with_the_size():
    tracemalloc.start()
    order = permutation(MAX_LENGTH)
    order[np.arange(1000)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000


@pytest.mark.parametrize("n", [0, -1, MAX_LENGTH + 1])
def test_a_size_out_of_range_is_refused(n):
    with pytest.raises(ValueError, match=r"1 to 2\*\*40"):
        permutation(n)


@pytest.mark.parametrize("index", [-1, 10, np.array([0, 10]), np.array([-1])])
def test_a_position_out_of_range_is_refused(index):
    with pytest.raises(IndexError, match="0 to 9"):
        permutation(10)[index]
