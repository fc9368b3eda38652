"""The text stage gives the same chunks with and without threads, from any position, and leaves no thread behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from deeplens_lightning.text.documents import Documents
from deeplens_lightning.text.packing import Chunk, Packing
from deeplens_lightning.text.pipeline import TextStage
from deeplens_lightning.text.sources import Row, Source, Text, open_source
from tests.support.texts import texts


@pytest.fixture
def tokenizer(tiny: Callable[[str], str]) -> PreTrainedTokenizerBase:
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny("llama"))
    return found


def stage(source: Source, tokenizer: PreTrainedTokenizerBase | None, threads: int = 0) -> TextStage:
    documents = Documents(source=source, split="train", val_fraction=0.1, seed=3)
    return TextStage(
        documents=documents,
        tokenizer=tokenizer,
        packing=Packing(seq_length=24, blocks=8),
        threads=threads,
    )


def same(a: Chunk, b: Chunk) -> bool:
    pairs = zip(a.blocks.tensors(), b.blocks.tensors(), strict=True)
    return a.start == b.start and a.empty == b.empty and all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_give_the_chunks_of_a_run_in_turn(threads: int, tokenizer: PreTrainedTokenizerBase) -> None:
    source = open_source(texts(300, 900))
    in_turn = list(stage(source, tokenizer).chunks(1))
    beside = list(stage(source, tokenizer, threads).chunks(1))
    assert len(in_turn) == len(beside) > 20
    assert all(same(a, b) for a, b in zip(in_turn, beside, strict=True))


@pytest.mark.parametrize("threads", [0, 2])
def test_a_chunk_can_be_made_again_from_its_own_position(
    threads: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    text = stage(open_source(texts(300, 900)), tokenizer, threads)
    whole = list(text.chunks(0))
    for at in (0, 1, len(whole) // 2, len(whole) - 1):
        found = list(islice(text.chunks(0, whole[at].start), 3))
        for a, b in zip(found, whole[at : at + 3], strict=True):
            assert a.start == b.start
            assert all(torch.equal(x, y) for x, y in zip(a.blocks.tensors(), b.blocks.tensors(), strict=True))


def test_documents_without_a_token_are_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    text = stage(open_source(["a b", "", " \n ", "c"]), tokenizer)
    assert sum(chunk.documents for chunk in text.chunks(0)) == 2
    assert sum(chunk.empty for chunk in text.chunks(0)) == 2


class Parts:
    """A source of 400 documents of token ids.

    Args:
        held: let the first read wait until `release` is set.
    """

    identity: dict[str, str] = {}  # noqa: RUF012
    parts = 1

    def __init__(self, held: bool = False) -> None:
        self.reads = 0
        self.release = threading.Event()
        if not held:
            self.release.set()

    def read(self, part: int, number: int, *, seed: int, epoch: int, reader: object = None) -> Iterator[Text]:
        self.reads += 1
        if self.reads == 1:
            assert self.release.wait(300)
        for n in range(number, 400):
            row: Row = [1 + n % 50] * (1 + n % 9)
            yield Text((part, n), n, row)


def test_a_thread_that_outlives_its_pipeline_takes_nothing_from_the_next_one() -> None:
    source = Parts(held=True)
    text = stage(source, None, threads=2)
    wanted = list(stage(Parts(), None).chunks(0))
    first = text.chunks(0)
    starting = threading.Thread(target=lambda: next(first), daemon=True)
    starting.start()
    while source.reads == 0:
        time.sleep(0.01)
    found = list(text.chunks(0))  # while the thread of the first pipeline still waits for its document
    source.release.set()
    assert all(same(a, b) for a, b in zip(found, wanted, strict=True))
    starting.join()
    rest = list(first)
    assert all(same(a, b) for a, b in zip(rest, wanted[1:], strict=True))


def test_an_error_of_the_source_is_raised_where_its_chunk_was_due() -> None:
    class Broken(Parts):
        def read(self, *args: object, **kwargs: object) -> Iterator[Text]:
            yield from islice(super().read(0, 0, seed=0, epoch=0), 100)
            raise OSError("the disk is gone")

    for threads in (0, 2):
        broken = Broken()
        with pytest.raises(OSError, match="the disk is gone"):
            list(stage(broken, None, threads).chunks(0))


def test_a_pipeline_that_is_dropped_ends_its_threads(tokenizer: PreTrainedTokenizerBase) -> None:
    before = set(threading.enumerate())
    chunks = stage(open_source(texts(300, 900)), tokenizer, threads=2).chunks(0)
    next(chunks)
    started = set(threading.enumerate()) - before
    assert started
    del chunks
    for thread in started:
        thread.join(300)
        assert not thread.is_alive()
