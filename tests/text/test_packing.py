"""Packing keeps segments whole, loses no token, and can make a chunk again from its start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deeplens_lightning.options import Isolation
from deeplens_lightning.stream.live_stream import GROUPED
from deeplens_lightning.text.packing import (
    Blocks,
    Packing,
    TokenizedDocument,
    is_packed,
    model_batches,
    model_inputs,
)
from deeplens_lightning.types import DealingState, TextPosition


def place(i: int, segment: int = 0) -> TextPosition:
    dealing = DealingState(ranks=1, by_shards=False, loads=(0,))
    return TextPosition(at=(0, i), reader=None, dealing=dealing, segment=segment)


def documents(lengths: Sequence[int]) -> list[TokenizedDocument]:
    starts = np.cumsum([1, *lengths])
    return [
        TokenizedDocument(position=place(i), index=i, hash=1000 + i, tokens=np.arange(start, start + length))
        for i, (start, length) in enumerate(zip(starts, lengths, strict=False))
    ]


def rows(blocks: Blocks) -> list[tuple[int, ...]]:
    columns = (blocks.documents, blocks.hashes, blocks.offsets, blocks.tokens)
    return [tuple(row) for row in torch.stack([c[blocks.keep] for c in columns], 1).tolist()]


packings = st.builds(
    lambda length, blocks, alone: Packing(seq_length=length, blocks=blocks, alone=alone),
    st.integers(1, 20),
    st.integers(1, 6),
    st.booleans(),
)
lengths_strategy = st.lists(st.integers(0, 60), max_size=30)


@given(packings, lengths_strategy)
@settings(max_examples=150, deadline=None)
def test_every_token_becomes_one_row_with_its_provenance(packing: Packing, lengths: list[int]) -> None:
    chunks = list(packing.chunks(documents(lengths)))
    found = sorted(row for chunk in chunks for row in rows(chunk.blocks))
    wanted = [
        (d.index, d.hash, offset, int(token))
        for d in documents(lengths)
        for offset, token in enumerate(d.tokens)
    ]
    assert found == sorted(wanted)
    assert all(len(chunk.blocks) == packing.blocks for chunk in chunks[:-1])
    assert sum(chunk.documents for chunk in chunks) == sum(length > 0 for length in lengths)


@given(packings, lengths_strategy)
@settings(max_examples=100, deadline=None)
def test_segments_stay_whole_and_positions_restart_at_each(packing: Packing, lengths: list[int]) -> None:
    for chunk in packing.chunks(documents(lengths)):
        b = chunk.blocks
        for row in range(len(b)):
            begins = [c for c in range(packing.seq_length) if b.positions[row, c] == 0]
            for begin, end in zip(begins, [*begins[1:], packing.seq_length], strict=True):
                segment = slice(begin, end)
                taken = b.positions[row, segment] >= 0
                length = int(taken.sum())
                assert b.positions[row, segment][:length].tolist() == list(range(length))
                assert len(set(b.documents[row, segment][:length].tolist())) == 1
                assert int(b.offsets[row, begin]) % packing.segment_tokens == 0
            assert not packing.alone or len(begins) == 1


@given(packings, lengths_strategy, st.data())
@settings(max_examples=100, deadline=None)
def test_a_chunk_can_be_made_again_from_its_start(
    packing: Packing, lengths: list[int], data: st.DataObject
) -> None:
    docs = documents(lengths)
    chunks = list(packing.chunks(docs))
    if not chunks:
        return
    chunk = data.draw(st.sampled_from(chunks))
    first = chunk.start.at[1]
    again = next(packing.chunks([replace(docs[first], position=chunk.start), *docs[first + 1 :]]))
    for a, b in zip(again.blocks.tensors(), chunk.blocks.tensors(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("seq_length", [128, 256, 1024])
def test_packing_wastes_under_one_percent(seq_length: int) -> None:
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(5.2, 1.0, 6000)).astype(int).clip(1, 4000).tolist()  # median 180 tokens
    chunks = list(Packing(seq_length=seq_length, blocks=16 * GROUPED).chunks(documents(lengths)))
    waste = [float((chunk.blocks.positions < 0).float().mean()) for chunk in chunks[:-1]]
    assert waste
    assert np.mean(waste) < 0.01


def test_special_tokens_surround_segments_and_do_not_become_rows() -> None:
    packing = Packing(seq_length=6, blocks=4, prefix=(500,), suffix=(501,), excluded=(500, 501))
    (chunk,) = packing.chunks(documents([7, 2]))
    assert chunk.blocks.tokens.tolist()[0] == [500, 1, 2, 3, 4, 501]
    assert sorted(chunk.blocks.tokens[chunk.blocks.keep].tolist()) == list(range(1, 10))
    assert set(chunk.blocks.offsets[chunk.blocks.tokens == 500].tolist()) == {-1}


def test_drop_first_n_leaves_out_the_start_of_every_segment() -> None:
    (chunk,) = Packing(seq_length=4, blocks=8, drop_first_n=2).chunks(documents([7, 1, 3]))
    assert sorted(chunk.blocks.tokens[chunk.blocks.keep].tolist()) == [3, 4, 7, 11]


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"seq_length": 2, "prefix": (1,), "suffix": (2,)}, "no room for text"),
        ({"seq_length": 8, "drop_first_n": 8}, "drop every token"),
    ],
)
def test_settings_without_rows_are_refused(settings_: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Packing(blocks=2, **settings_)  # type: ignore[arg-type]


@pytest.mark.parametrize("isolation", ["packed", "padded", "equal", "none"])
def test_model_batches_hold_every_block_once(isolation: Isolation) -> None:
    packing = Packing(seq_length=8, blocks=40, alone=isolation in ("padded", "equal"))
    (chunk,) = packing.chunks(documents([8, 3, 8, 5, 5, 16, 2, 2, 7]))
    batches = model_batches(chunk.blocks, 3, isolation)
    assert sorted(torch.cat(batches).tolist()) == list(range(len(chunk.blocks)))
    assert max(map(len, batches)) <= 3
    for index in batches:
        blocks = chunk.blocks.select(index)
        inputs = model_inputs(blocks, isolation)
        lengths = (blocks.positions >= 0).sum(1)
        if isolation == "equal":
            assert inputs.position_ids is inputs.attention_mask is None
            assert set(lengths.tolist()) == {inputs.tokens.shape[1]}
        elif isolation == "padded":
            assert inputs.attention_mask is not None
            assert inputs.attention_mask.sum(1).tolist() == lengths.tolist()
            assert inputs.tokens.shape[1] == int(lengths.max())


def test_full_segments_share_batches_so_that_they_take_the_causal_path() -> None:
    (chunk,) = Packing(seq_length=8, blocks=40).chunks(documents([8, 3, 8, 5, 8, 2, 8]))
    first, *_ = model_batches(chunk.blocks, 4, "packed")
    assert not is_packed(chunk.blocks.select(first)).any()
    assert model_inputs(chunk.blocks.select(first), "packed").position_ids is None
    last = chunk.blocks.select(model_batches(chunk.blocks, 4, "packed")[-1])
    positions = model_inputs(last, "packed").position_ids
    assert positions is not None
    assert (positions >= 0).all()  # pads count as one more segment


def test_every_chunk_but_the_last_has_all_its_blocks_whatever_the_lengths() -> None:
    rng = np.random.default_rng(1)
    for trial in range(300):
        blocks, seq_length = int(rng.integers(1, 7)), int(rng.integers(4, 20))
        lengths = rng.integers(1, 2 * seq_length, 40).tolist()
        chunks = list(Packing(seq_length=seq_length, blocks=blocks).chunks(documents(lengths)))
        assert {len(chunk.blocks) for chunk in chunks[:-1]} <= {blocks}, trial
        assert sum(int(chunk.blocks.keep.sum()) for chunk in chunks) == sum(lengths)
