"""Every document goes to one rank and one split; dealing again after a change of ranks loses none."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from deeplens_lightning.text.documents import (
    Dealing,
    Documents,
    document_hash,
    is_heldout,
    special_affixes,
    tokenize,
)
from deeplens_lightning.text.packing import TokenizedDocument
from deeplens_lightning.text.sources import IndexedSource, Source, Text, open_source
from tests.support.tiny import paragraphs


def read(
    source: Source, split: str, rank: int = 0, ranks: int = 1, **more: object
) -> list[TokenizedDocument]:
    documents = Documents(
        source=source,
        tokenizer=None,
        split=split,  # type: ignore[arg-type]
        val_fraction=0.3,
        seed=3,
        rank=rank,
        ranks=ranks,
    )
    return list(documents.read(more.get("epoch", 0), more.get("cursor")))  # type: ignore[arg-type]


def ids(lengths: list[int]) -> IndexedSource:
    return IndexedSource([[i] * n for i, n in enumerate(lengths)], {"dataset": "ids"})


def test_the_hash_is_that_of_blake2b_and_the_same_everywhere() -> None:
    assert document_hash("") == int.from_bytes(bytes.fromhex("e4a6a0577479b2b4"), "big", signed=True)
    assert document_hash("Ångström 🦜") == document_hash("Ångström 🦜")
    assert document_hash("a\ud800") != document_hash("a")  # a lone surrogate is a text, too


def test_the_held_out_share_is_what_was_asked_for_and_grows_with_it() -> None:
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
    loads = [sum(len(d.tokens) for d in read(ids(lengths), "train", rank, 8)) for rank in range(8)]
    assert max(loads) / min(loads) < 1.02


def test_the_order_is_another_every_epoch_and_the_same_every_time() -> None:
    orders = [[d.index for d in read(ids([1] * 100), "train", epoch=epoch)] for epoch in (0, 0, 1)]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.integers(1, 3), st.data())
@settings(max_examples=60, deadline=None)
def test_reading_on_from_a_cursor(lengths: list[int], ranks: int, data: st.DataObject) -> None:
    source = ids(lengths)
    whole = read(source, "train", 0, ranks)
    if whole:
        here = data.draw(st.integers(0, len(whole) - 1))
        rest = read(source, "train", 0, ranks, cursor=whole[here].cursor)
        assert [d.index for d in rest] == [d.index for d in whole[here:]]
        assert [d.cursor for d in rest] == [d.cursor for d in whole[here:]]


class Shards:
    """Six shards of documents, streamed."""

    shards = 6
    identity: dict[str, str] = {}  # noqa: RUF012

    def read(self, shard: int, number: int, *, seed: int, epoch: int, state: object = None) -> Iterator[Text]:
        for n in range(number, 10):
            yield Text((shard, n), shard * 100 + n, [shard] * (1 + n))


@pytest.mark.parametrize(
    "source", [Shards(), ids([1 + i % 13 for i in range(70)])], ids=["shards", "indexed"]
)
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (3, 2), (2, 3)])
def test_after_a_change_of_ranks_all_and_only_unfinished_documents_are_dealt(
    source: Source, before: int, after: int
) -> None:
    parts = [read(source, "train", rank, before) for rank in range(before)]
    stops = [(7 * (rank + 1)) % max(1, len(part)) for rank, part in enumerate(parts)]
    finished = {d.index for part, stop in zip(parts, stops, strict=True) for d in part[:stop]}
    cursors = [part[stop].cursor for part, stop in zip(parts, stops, strict=True)]
    frontiers = [(*cursor["at"], 0) for cursor in cursors]
    first = min(range(before), key=frontiers.__getitem__)
    again: list[int] = []
    for rank in range(after):
        documents = Documents(
            source=source, tokenizer=None, split="train", val_fraction=0.3, seed=3, rank=rank, ranks=after
        )
        dealing = documents.dealt_again(cursors[first], frontiers, before)
        cursor = {"at": list(frontiers[first][:2]), "state": None, "dealing": dealing}
        again += [d.index for d in documents.read(0, cursor)]
    everything = {d.index for part in parts for d in part}
    assert len(again) == len(set(again))
    assert set(again) == everything - finished


def test_a_dealing_survives_its_state() -> None:
    dealing = Dealing(
        3, by_shards=False, earlier=Dealing(2, by_shards=True, frontiers=[(0, 1, 2), (3, 4, 5)])
    )
    for i in range(10):
        dealing.deal((4, i), 5 + i)
    assert Dealing.from_state_dict(dealing.state_dict()) == dealing


def test_tokenizing_in_groups_gives_what_the_tokenizer_gives(tiny: object) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))  # type: ignore[operator]
    texts = paragraphs(20)
    got = tokenize(texts, tokenizer)
    for text, tokens in zip(texts, got, strict=True):
        wanted = tokenizer(text, add_special_tokens=False)["input_ids"] if text.strip() else []
        assert tokens.tolist() == wanted


def test_empty_and_blank_documents_are_skipped_and_counted(tiny: object) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))  # type: ignore[operator]
    documents = Documents(
        source=open_source(["a b", "", " \n ", "c"]),
        tokenizer=tokenizer,
        split="train",
        val_fraction=0,
        seed=0,
    )
    assert len(list(documents.read(0))) == 2
    assert documents.empty == 2


def test_texts_without_a_tokenizer_are_refused() -> None:
    with pytest.raises(ValueError, match="give tokenizer="):
        tokenize(["text"], None)


def test_a_bos_goes_in_front_when_asked_for(tiny: object) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))  # type: ignore[operator]
    assert special_affixes(tokenizer, None) == ((), ())  # this tokenizer adds nothing of its own
    assert special_affixes(tokenizer, True) == ((0,), ())
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="no BOS token"):
        special_affixes(tokenizer, True)


def test_cursors_are_in_order(tiny: object) -> None:
    places = [tuple(d.cursor["at"]) for d in read(ids([2] * 50), "train")]
    assert all(a < b for a, b in pairwise(places))
