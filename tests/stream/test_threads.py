"""Text and model in threads of their own, as on an accelerator: the same batches, positions and cache."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deeplens_lightning.shards import verify
from deeplens_lightning.stream.live_activations import LiveActivations
from deeplens_lightning.stream.live_stream import LiveStream
from deeplens_lightning.stream.measured_statistics import Statistics
from deeplens_lightning.stream.prefetch import TURN
from deeplens_lightning.stream.write_through import WriteThroughStream
from deeplens_lightning.types import Served
from tests.support.training import data


def threaded(stream: LiveStream) -> LiveStream:
    return replace(stream, ahead=1, text=replace(stream.text, threads=1))


def opened(lm: str, **changes: object) -> tuple[LiveActivations, LiveStream | WriteThroughStream]:
    dm = data(lm, **changes)
    dm.setup("fit")
    assert dm.live is not None
    limits = Statistics(scalings={}, max_norms={"layers.1.mlp_act": 1e3})
    return dm.live, dm.live.stream(16, limits, None)


def assert_equal(found: list[Served], expected: list[Served]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert all(torch.equal(a.rows[name], b.rows[name]) for name in a.rows)
        assert torch.equal(a.provenance, b.provenance)
        assert (a.position, a.step, a.certain) == (b.position, b.step, b.certain)


def test_threads_change_no_batch_and_no_position(tiny: Callable[[str], str]) -> None:
    live, plain = opened(tiny("gpt2"))
    assert isinstance(plain, LiveStream)
    expected = list(plain.batches(plain.start(0), 0))
    stream = threaded(plain)
    assert_equal(list(stream.batches(stream.start(0), 0)), expected)
    for number in (0, 7, len(expected) // 2):
        at = expected[number]
        assert_equal(list(islice(stream.batches(at.position, at.step), 5)), expected[number + 1 : number + 6])
    assert "activation-producer" in {thread.name for thread in threading.enumerate()}
    stream.close()
    plain.close()
    live.close()
    assert "activation-producer" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("stop", [3, 40])
def test_a_cache_written_with_threads_has_every_row(
    stop: int, tiny: Callable[[str], str], tmp_path: Path
) -> None:
    live, stream = opened(tiny("gpt2"), write_shards=str(tmp_path / "cache"))
    assert isinstance(stream, WriteThroughStream)
    whole = sum(len(served.provenance) for served in stream.live.batches(stream.start(0), 0))
    stream.live.close()
    stream.live = threaded(stream.live)
    batches = stream.batches(stream.start(0), 0)
    list(islice(batches, stop))
    stream.sync()
    batches.close()  # type: ignore[attr-defined]  the epoch ends early on this rank
    position = stream.start(0)
    assert stream.dropped(position, stop) == whole - 16 * stop
    stream.start(1)
    stream.close()
    live.close()
    report = verify(str(tmp_path / "cache"))
    assert report.problems == []
    assert report.rows == whole + 64


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_cache_is_not_complete_when_the_model_failed_before_the_end(
    ahead: int, tiny: Callable[[str], str], tmp_path: Path
) -> None:
    live, stream = opened(tiny("gpt2"), write_shards=str(tmp_path / "cache"))
    assert isinstance(stream, WriteThroughStream)
    stream.live = replace(threaded(stream.live), ahead=ahead)
    batches = stream.batches(stream.start(0), 0)
    list(islice(batches, 3))
    run, calls = live.model.activations, 0

    def fails_once(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise ConnectionError("the model is away")
        return run(*args, **kwargs)

    live.model.activations = fails_once  # type: ignore[method-assign]
    with pytest.raises(ConnectionError):
        list(batches)
    with pytest.raises(ConnectionError):  # the epoch ends unevenly, and the rest of it is to be written
        stream.dropped(stream.start(0), 3)
    stream.close()
    live.close()
    assert not (tmp_path / "cache" / "index.json").exists()


def test_threads_take_short_turns_only_while_one_prefetches(tiny: Callable[[str], str]) -> None:
    before = sys.getswitchinterval()
    dm = data(tiny("gpt2"), prefetch=2)
    dm.setup("fit")
    batches = iter(dm.train_dataloader())
    next(batches)
    assert sys.getswitchinterval() <= TURN < before
    dm.teardown("fit")
    assert sys.getswitchinterval() == before
