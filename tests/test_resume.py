"""Resuming from any state gives the batches of a run that never stopped: every source and setting, without a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any
from zlib import crc32

import datasets
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from transformers import AutoTokenizer

from deeplens_lightning.datamodule import ActivationDataModule
from deeplens_lightning.options import BufferOptions, ModelOptions, TextOptions
from tests.support.models import save_model
from tests.support.recorder import assert_same, take
from tests.support.texts import texts, write_jsonl
from tests.support.training import data

LONG = 26  # documents


def _jsonl(folder: Path, lm: str) -> str:
    return str(write_jsonl(folder / "texts.jsonl", texts(LONG)))


def _parquet(folder: Path, lm: str) -> str:
    for i in range(3):
        datasets.Dataset.from_dict({"text": texts(LONG)[i::3]}).to_parquet(folder / f"{i}.parquet")
    return str(folder / "*.parquet")


def _txt(folder: Path, lm: str) -> str:
    for i, text in enumerate(texts(LONG)):
        (folder / f"{i:03}.txt").write_text(text)
    return str(folder)


def _dataset(folder: Path, lm: str) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": texts(LONG)})


def _generated(folder: Path, lm: str) -> datasets.IterableDataset:
    def documents() -> Iterator[dict[str, str]]:
        yield from ({"text": text} for text in texts(LONG))

    return datasets.IterableDataset.from_generator(documents)


def _streamed(folder: Path, lm: str) -> datasets.IterableDataset:
    return datasets.load_dataset("json", data_files=_jsonl(folder, lm), split="train", streaming=True)


def _sharded(folder: Path, lm: str) -> datasets.IterableDataset:
    return _dataset(folder, lm).to_iterable_dataset(num_shards=4).map(lambda row: {"text": row["text"] + "."})


def _shuffled(folder: Path, lm: str) -> datasets.IterableDataset:
    return _dataset(folder, lm).to_iterable_dataset(num_shards=2).shuffle(seed=3, buffer_size=9)


def _tokens(folder: Path, lm: str) -> datasets.Dataset:
    tokenizer = AutoTokenizer.from_pretrained(lm)
    return datasets.Dataset.from_dict(
        {"text": [tokenizer(text)["input_ids"] for text in texts(LONG) if text]}
    )


SOURCES: dict[str, Callable[[Path, str], Any]] = {
    "list": lambda folder, lm: texts(LONG),
    "jsonl": _jsonl,
    "parquet": _parquet,
    "txt": _txt,
    "dataset": _dataset,
    "generated": _generated,
    "streamed": _streamed,
    "sharded": _sharded,
    "shuffled": _shuffled,
    "tokens": _tokens,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "normalize": {"normalize": "zscore"},
    "sinks": {
        "buffer_options": BufferOptions(max_norm_ratio=1.2),
        "text_options": TextOptions(drop_first_n=1),
    },
    "padded": {"model_options": ModelOptions(isolation="padded")},
    "equal": {"model_options": ModelOptions(isolation="equal"), "inference_batch_size": 3},
    "undivided": {"model_options": ModelOptions(isolation="none")},
    "no block pool": {"buffer_options": BufferOptions(shuffle_blocks=False)},
    "two hooks": {"layer": [0, 1], "hook": ["mlp_act", "resid_post"]},
    "prefetch": {"prefetch": 3},
    "buffer of one batch": {"buffer_size": 16},
    "everything in the buffer": {"buffer_size": 16_000},
    "known epochs": {"max_tokens": 640},
}


def opened(dm: ActivationDataModule) -> ActivationDataModule:
    dm.setup("fit")
    return dm


def resumes_everywhere(dm: ActivationDataModule, stride: int) -> None:
    """Record the states of a run into its second epoch; resume from every `stride`-th and around the end of the epoch."""
    opened(dm)
    states, run, epochs = [deepcopy(dm.state_dict())], [], [0]
    while epochs.count(1) < 15:
        run += take(dm, 1)
        states.append(deepcopy(dm.state_dict()))
        epochs.append(states[-1]["position"]["ranks"][0]["position"]["epoch"])
    epoch_end = range(epochs.index(1) - 4, epochs.index(1) + 3)
    for at in sorted({*range(0, len(run) - 3, stride), 1, 2, 3, *epoch_end}):
        dm.load_state_dict(states[at])
        assert_same(take(dm, 3), run[at : at + 3])
    dm.teardown("fit")


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_resumes_bit_for_bit_from_any_batch(source: str, tiny: Any, tmp_path: Path) -> None:
    lm = tiny("gpt2")
    dataset = SOURCES[source](tmp_path, lm)
    resumes_everywhere(data(lm, dataset), stride=17)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_setting_resumes_bit_for_bit_from_any_batch(variant: str, tiny: Any) -> None:
    resumes_everywhere(data(tiny("gpt2"), texts(LONG), **VARIANTS[variant]), stride=13)


def test_the_demo_text_resumes_bit_for_bit(tiny: Any) -> None:
    settings_: dict[str, Any] = {"batch_size": 64, "buffer_size": 1024}
    dm = opened(data(tiny("gpt2"), "demo:docs", **settings_))
    run = take(dm, 30)
    state = deepcopy(dm.state_dict())
    run += take(dm, 10)
    again = opened(data(tiny("gpt2"), "demo:docs", **settings_))
    again.load_state_dict(state)
    assert_same(take(again, 10), run[30:])
    dm.teardown("fit")
    again.teardown("fit")


@pytest.mark.parametrize("source", [*SOURCES, "demo"])
def test_a_run_stopped_twice_equals_one_that_never_stopped(source: str, tiny: Any, tmp_path: Path) -> None:
    lm = tiny("gpt2")
    dataset = "demo:docs" if source == "demo" else SOURCES[source](tmp_path, lm)

    @seed(crc32(source.encode()))
    @given(draw=st.data())
    @settings(max_examples=5, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    def check(draw: st.DataObject) -> None:
        batch = draw.draw(st.integers(1, 24), "batch")
        chosen = {
            "batch_size": batch,
            "buffer_size": batch * draw.draw(st.integers(1, 30), "buffer"),
            "seq_length": draw.draw(st.integers(12, 64), "block"),
            "inference_batch_size": draw.draw(st.integers(2, 5), "model batch"),
            "seed": draw.draw(st.integers(0, 2**40), "seed"),
            "normalize": draw.draw(st.sampled_from(["none", "mean_norm"]), "normalize"),
            "buffer_options": BufferOptions(shuffle_blocks=draw.draw(st.booleans(), "pool")),
            "model_options": ModelOptions(
                isolation=draw.draw(st.sampled_from(["packed", "padded", "equal"]), "isolation")
            ),
        }
        first = draw.draw(st.integers(0, 50), "first stop")
        second = draw.draw(st.integers(0, 50), "second stop")
        whole = opened(data(lm, dataset, **chosen))
        run = take(whole, first + second + 20)
        whole.teardown("fit")
        found, state = [], None
        for count in (first, second, 20):
            dm = opened(data(lm, dataset, **chosen))
            if state is not None:
                dm.load_state_dict(state)
            found += take(dm, count)
            state = deepcopy(dm.state_dict())
            dm.teardown("fit")
        assert_same(found, run)

    check()


def test_a_wide_model_resumes_bit_for_bit(tmp_path: Path) -> None:
    lm = str(save_model(tmp_path, "gpt2", width=768, layers=2))
    changes: dict[str, Any] = {"buffer_size": 192, "inference_batch_size": 3, "seq_length": 48}
    dm = opened(data(lm, texts(20), **changes))
    states, run = [], []
    for _ in range(40):
        states.append(deepcopy(dm.state_dict()))
        run += take(dm, 1)
    for at in (0, 5, 17, 30):
        dm.load_state_dict(states[at])
        assert_same(take(dm, 6), run[at : at + 6])
    dm.teardown("fit")


def test_resuming_runs_the_model_over_at_most_two_windows_of_rows(tiny: Any) -> None:
    changes: dict[str, Any] = {"batch_size": 16, "buffer_size": 160, "inference_batch_size": 1}
    dm = opened(data(tiny("gpt2"), texts(600), **changes))
    states = []
    for _ in range(200):
        take(dm, 1)
        states.append(deepcopy(dm.state_dict()))
    for state in states[40::23]:
        dm.load_state_dict(state)
        take(dm, 1)
        assert dm.serving.loader is not None
        assert (
            dm.serving.loader.stream.counts["tokens"] <= 2 * 160 + 3 * 32
        )  # two windows, and the rest of model batches
    dm.teardown("fit")


def test_a_state_has_the_same_small_size_for_every_buffer(tiny: Any, tmp_path: Path) -> None:
    sizes = []
    for buffer in (64, 64_000):
        dm = opened(data(tiny("gpt2"), buffer_size=buffer, normalize="zscore"))
        take(dm, 3)
        torch.save(dm.state_dict(), tmp_path / "state.pt")
        assert torch.load(tmp_path / "state.pt", weights_only=True)["version"] == 2
        sizes.append((tmp_path / "state.pt").stat().st_size)
        dm.teardown("fit")
    assert abs(sizes[0] - sizes[1]) < 1000
    assert max(sizes) < 10_000


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "layer": ({"layer": 2}, "hook points: layers.1.mlp_act in the checkpoint, layers.2.mlp_act now"),
    "dataset": ({"dataset": texts(59)}, "dataset: 60 texts"),
    "seq_length": ({"seq_length": 48}, "seq_length: 32 in the checkpoint, 48 now"),
    "batch_size": ({"batch_size": 8}, "batch_size: 16 in the checkpoint, 8 now"),
    "seed": ({"seed": 1}, "seed: 0 in the checkpoint, 1 now"),
    "isolation": (
        {"model_options": ModelOptions(isolation="padded")},
        "isolation: packed in the checkpoint, padded now",
    ),
    "val_fraction": ({"val_fraction": 0.1}, "val_fraction: 0.2 in the checkpoint, 0.1 now"),
    "normalize": ({"normalize": "zscore"}, "normalize: none in the checkpoint, zscore now"),
    "inference_batch_size": ({"inference_batch_size": 4}, "inference_batch_size: 2 in the checkpoint"),
    "buffer_size": ({"buffer_size": 160}, "buffer_size: 96 in the checkpoint, 160 now"),
    "automatic buffer": ({"buffer_size": "auto"}, "buffer_size: 96 in the checkpoint, auto now"),
}


@pytest.mark.parametrize("changed", CHANGES)
def test_resuming_on_other_data_is_refused_and_names_the_difference(changed: str, tiny: Any) -> None:
    changes, message = CHANGES[changed]
    dm = opened(data(tiny("gpt2")))
    take(dm, 2)
    state = deepcopy(dm.state_dict())
    dm.teardown("fit")
    other = opened(data(tiny("gpt2"), **changes))
    with pytest.raises(ValueError, match="taken on other data") as error:
        other.load_state_dict(state)
    assert message in str(error.value)
    lines = 1 + (changed == "layer")  # another depth loads other weights
    assert str(error.value).count(" in the checkpoint, ") == lines, "there are more lines than differences"
    other.teardown("fit")


def test_resuming_with_other_weights_is_refused_unless_resume_anyway_is_given(
    tiny: Any, tmp_path: Path
) -> None:
    lm = save_model(tmp_path, "gpt2")
    dm = opened(data(str(lm)))
    take(dm, 2)
    state = deepcopy(dm.state_dict())
    dm.teardown("fit")
    weights = lm / "model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("h.0.mlp.c_fc.weight"))
    tensors[name] = tensors[name] * 1.5
    save_file(tensors, weights, metadata={"format": "pt"})
    other = opened(data(str(lm)))
    with pytest.raises(ValueError, match="model weights: "):
        other.load_state_dict(state)
    other.teardown("fit")
    insisting = opened(data(str(lm), resume_anyway=True))
    insisting.load_state_dict(state)
    assert len(take(insisting, 2)) == 2
    insisting.teardown("fit")


def test_another_version_of_the_state_is_refused(tiny: Any) -> None:
    dm = opened(data(tiny("gpt2")))
    with pytest.raises(ValueError, match="version 99"):
        dm.load_state_dict({**dm.state_dict(), "version": 99})
    dm.teardown("fit")
