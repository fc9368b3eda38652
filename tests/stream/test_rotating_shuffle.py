"""The rotating shuffle serves every row once, mixes them, and can start at any position."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deeplens_lightning.stream.rotating_shuffle import Mixed, RotatingShuffle


class Numbers:
    """Rows whose value is their number."""

    def __init__(self, buffer: Tensor, count: int, at: int = 0) -> None:
        self.buffer, self.count, self.at = buffer, count, at

    def position(self) -> dict[str, int]:
        return {"at": self.at}

    def fill(self, slots: Tensor) -> int:
        count = min(len(slots), self.count - self.at)
        self.buffer.index_copy_(0, slots[:count], torch.arange(self.at, self.at + count))
        self.at += count
        return count


def serve(shuffle: RotatingShuffle, count: int, window: int = 0, at: int = 0, skip: int = 0) -> list[Mixed]:
    buffer = torch.full((shuffle.capacity,), -1)
    return list(shuffle.serve([buffer], Numbers(buffer, count, at), window=window, skip=skip))


shuffles = st.builds(
    lambda batch, capacity, first, seed: RotatingShuffle(
        batch_size=batch,
        capacity=batch * capacity,
        first_window=batch * min(first, capacity),
        entropy=(seed,),
    ),
    st.integers(1, 9),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(0, 1000),
)


@given(shuffles, st.integers(0, 500))
@settings(max_examples=150, deadline=None)
def test_every_row_is_served_exactly_once_and_only_the_last_batch_is_short(
    shuffle: RotatingShuffle, count: int
) -> None:
    batches = [mixed.tensors[0] for mixed in serve(shuffle, count)]
    assert sorted(torch.cat(batches).tolist() if batches else []) == list(range(count))
    assert all(len(batch) == shuffle.batch_size for batch in batches[:-1])


@given(shuffles, st.integers(1, 500), st.data())
@settings(max_examples=150, deadline=None)
def test_starting_at_a_position_serves_the_same_batches(
    shuffle: RotatingShuffle, count: int, data: st.DataObject
) -> None:
    whole = serve(shuffle, count)
    here = data.draw(st.integers(0, len(whole) - 1))
    rest = serve(shuffle, count, whole[here].window, whole[here].start["at"], whole[here].step)
    assert len(rest) == len(whole) - here
    for a, b in zip(rest, whole[here:], strict=True):
        assert torch.equal(a.tensors[0], b.tensors[0])


@given(shuffles, st.integers(1, 500))
@settings(max_examples=100, deadline=None)
def test_what_is_called_certain_comes(shuffle: RotatingShuffle, count: int) -> None:
    whole = serve(shuffle, count)
    for i, mixed in enumerate(whole):
        coming = [len(m.tensors[0]) for m in whole[i : i + mixed.certain]]
        assert len(coming) == mixed.certain
        assert sum(coming) == mixed.certain_rows


def test_replayed_rows_are_at_most_two_windows() -> None:
    shuffle = RotatingShuffle(batch_size=4, capacity=40, first_window=8, entropy=(0,))
    for mixed in serve(shuffle, 400):
        replayed = shuffle.rows_to_replay(mixed.window, mixed.step)
        assert replayed <= shuffle.window_size(mixed.window) + shuffle.window_size(mixed.window + 1)


def test_rows_are_served_far_from_where_they_arrived() -> None:
    shuffle = RotatingShuffle(batch_size=16, capacity=1024, first_window=64, entropy=(0,))
    served = torch.cat([mixed.tensors[0] for mixed in serve(shuffle, 8192)]).double()
    distance = (served - torch.arange(8192)).abs()
    assert distance.mean() > 250  # a full shuffle of one window of 1024 rows moves a row by 341 on average
    neighbours = served.diff().abs().median()
    assert neighbours > 250


def test_the_first_batch_waits_for_the_first_window_alone() -> None:
    shuffle = RotatingShuffle(batch_size=8, capacity=8000, first_window=32, entropy=(0,))
    buffer = torch.full((8000,), -1)
    numbers = Numbers(buffer, 10**6)
    next(shuffle.serve([buffer], numbers))
    assert numbers.at == 32
