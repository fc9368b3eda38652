"""Every document goes to one rank and one split; dealing again after a change of ranks loses none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deeplens_lightning.text.dealing import Dealing
from deeplens_lightning.text.documents import Documents, RankDocument, document_hash, is_heldout
from deeplens_lightning.text.sources import IndexedSource, Source, Text
from deeplens_lightning.types import DealingState, TextPosition


def read(source: Source, split: str, rank: int = 0, ranks: int = 1, **more: object) -> list[RankDocument]:
    documents = Documents(
        source=source,
        split=split,  # type: ignore[arg-type]
        val_fraction=0.3,
        seed=3,
        rank=rank,
        ranks=ranks,
    )
    return list(documents.read(more.get("epoch", 0), more.get("start")))  # type: ignore[arg-type]


def ids(lengths: list[int]) -> IndexedSource:
    return IndexedSource([[i] * n for i, n in enumerate(lengths)], {"dataset": "ids"})


def test_the_hash_is_that_of_blake2b_and_the_same_everywhere() -> None:
    assert document_hash("") == int.from_bytes(bytes.fromhex("e4a6a0577479b2b4"), "big", signed=True)
    assert document_hash("Ångström 🦜") == document_hash("Ångström 🦜")
    assert document_hash("a\ud800") != document_hash("a")  # a lone surrogate is a text, too


def test_the_held_out_share_equals_val_fraction_and_grows_with_it() -> None:
    hashes = [document_hash(f"text {i}") for i in range(20_000)]
    shares = [sum(is_heldout(h, f) for h in hashes) / len(hashes) for f in (0.0, 0.05, 0.5, 1.0)]
    assert shares[0] == 0
    assert shares[1] == pytest.approx(0.05, abs=0.006)
    assert shares[3] == 1
    assert all(is_heldout(h, 0.5) for h in hashes if is_heldout(h, 0.05))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_splits_and_ranks_share_out_every_document_once(lengths: list[int], ranks: int) -> None:
    source = ids(lengths)
    parts = [read(source, split, rank, ranks) for split in ("train", "heldout") for rank in range(ranks)]
    found = sorted(document.index for part in parts for document in part)
    assert found == list(range(len(lengths)))


def test_ranks_get_nearly_equal_numbers_of_characters() -> None:
    lengths = [1 + (i * 7919) % 997 for i in range(2000)]
    loads = [sum(len(d.row) for d in read(ids(lengths), "train", rank, 8)) for rank in range(8)]
    assert max(loads) / min(loads) < 1.02


def test_the_order_differs_between_epochs_and_repeats_between_runs() -> None:
    orders = [[d.index for d in read(ids([1] * 100), "train", epoch=epoch)] for epoch in (0, 0, 1)]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.integers(1, 3), st.data())
@settings(max_examples=60, deadline=None)
def test_reading_continues_from_a_position(lengths: list[int], ranks: int, data: st.DataObject) -> None:
    source = ids(lengths)
    whole = read(source, "train", 0, ranks)
    if whole:
        here = data.draw(st.integers(0, len(whole) - 1))
        rest = read(source, "train", 0, ranks, start=whole[here].position)
        assert [d.index for d in rest] == [d.index for d in whole[here:]]
        assert [d.position for d in rest] == [d.position for d in whole[here:]]


class Parts:
    """Six parts of documents, streamed."""

    parts = 6
    identity: dict[str, str] = {}  # noqa: RUF012

    def read(self, part: int, number: int, *, seed: int, epoch: int, reader: object = None) -> Iterator[Text]:
        for n in range(number, 10):
            yield Text((part, n), part * 100 + n, [part] * (1 + n))


@pytest.mark.parametrize("source", [Parts(), ids([1 + i % 13 for i in range(70)])], ids=["parts", "indexed"])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (3, 2), (2, 3)])
def test_after_a_change_of_ranks_all_and_only_unfinished_documents_are_dealt(
    source: Source, before: int, after: int
) -> None:
    parts = [read(source, "train", rank, before) for rank in range(before)]
    stops = [(7 * (rank + 1)) % max(1, len(part)) for rank, part in enumerate(parts)]
    finished = {d.index for part, stop in zip(parts, stops, strict=True) for d in part[:stop]}
    starts = [part[stop].position for part, stop in zip(parts, stops, strict=True)]
    frontiers = [(*start.at, 0) for start in starts]
    first = min(range(before), key=frontiers.__getitem__)
    again: list[int] = []
    for rank in range(after):
        documents = Documents(source=source, split="train", val_fraction=0.3, seed=3, rank=rank, ranks=after)
        dealing = documents.dealt_again(starts[first], frontiers, before)
        start = TextPosition(at=starts[first].at, reader=None, dealing=dealing)
        again += [d.index for d in documents.read(0, start)]
    everything = {d.index for part in parts for d in part}
    assert len(again) == len(set(again))
    assert set(again) == everything - finished


def test_a_dealing_is_the_same_after_saving_and_loading_its_state() -> None:
    earlier = Dealing(ranks=2, by_shards=True, frontiers=[(0, 1, 2), (3, 4, 5)])
    dealing = Dealing(ranks=3, by_shards=False, earlier=earlier)
    for i in range(10):
        dealing.deal((4, i), 5 + i)
    assert Dealing.from_state(dealing.state()) == dealing
    state = json.loads(json.dumps(dealing.state().to_state()))
    assert DealingState.from_state(state) == dealing.state()


def test_positions_are_in_order(tiny: object) -> None:
    places = [d.position.at for d in read(ids([2] * 50), "train")]
    assert all(a < b for a, b in pairwise(places))
