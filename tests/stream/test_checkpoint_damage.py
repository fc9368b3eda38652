"""Damaged states of a data module are refused in a sentence or give the right data; states of version 1 still load."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deeplens_lightning.callbacks import StreamStatistics
from deeplens_lightning.datamodule import ActivationDataModule
from deeplens_lightning.sae import SparseAutoencoder
from deeplens_lightning.shards.errors import DamagedShardError
from deeplens_lightning.shards.format import Resume
from tests.support.recorder import take
from tests.support.training import sae, trainer
from tests.support.write_fixtures import CACHES, cached_data, live_data, next_rows, opened

FIXTURES = Path(__file__).parents[1] / "fixtures" / "v1" / "states"
LIVE: dict[str, dict[str, Any]] = {
    "live": {},
    "scaled_live": {"normalize": "center"},
    "two_ranks": {"resume_anyway": True},
}
REFUSED = ("many", "window_many")
Made = Callable[[str], ActivationDataModule]


@pytest.fixture(scope="module")
def made(tiny: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """The data module of a fixture, set up once."""
    folder, found = tmp_path_factory.mktemp("states"), dict[str, ActivationDataModule]()

    def make(name: str) -> ActivationDataModule:
        if name not in found:
            fresh = (
                live_data(tiny("llama"), **LIVE[name]) if name in LIVE else cached_data(folder / name, name)
            )
            found[name] = opened(fresh)
        return found[name]

    yield make
    for datamodule in found.values():
        datamodule.teardown("fit")


def fixture(name: str, datamodule: ActivationDataModule) -> tuple[dict[str, Any], Tensor]:
    """A state of version 1 with the fingerprint of this machine, and the rows of the three batches that follow."""
    content = torch.load(FIXTURES / f"{name}.pt", weights_only=True)
    return content["state"] | {"fingerprint": fingerprint(datamodule)}, content["next"]


def fingerprint(datamodule: ActivationDataModule) -> dict[str, str]:
    found: dict[str, str] = datamodule.state_dict()["fingerprint"]
    return found


@pytest.mark.parametrize("name", [*LIVE, *(name for name in CACHES if name not in (*REFUSED, "epoch_end"))])
def test_a_state_of_version_1_continues_with_the_same_rows(made: Made, name: str) -> None:
    datamodule = made(name)
    state, expected = fixture(name, datamodule)
    datamodule.load_state_dict(state)
    assert torch.equal(next_rows(datamodule), expected)
    assert datamodule.state_dict()["version"] == 2


@pytest.mark.parametrize("name", REFUSED)
def test_a_position_in_an_order_of_version_1_that_has_changed_is_refused(made: Made, name: str) -> None:
    datamodule = made(name)
    state, expected = fixture(name, datamodule)
    datamodule.load_state_dict(state)
    with pytest.raises(ValueError, match=r"read this cache in another order.*or give resume_anyway=True"):
        next_rows(datamodule)
    shards = str(datamodule.settings.shards)
    options = datamodule.settings.cache_options
    insisting = opened(
        ActivationDataModule(
            shards=shards, batch_size=40, val_fraction=0.2, cache_options=options, resume_anyway=True
        )
    )
    insisting.load_state_dict(state)
    assert next_rows(insisting).shape == expected.shape
    insisting.teardown("fit")


def test_a_state_of_version_1_between_two_epochs_begins_the_next_epoch(made: Made) -> None:
    datamodule = made("epoch_end")
    state, _ = fixture("epoch_end", datamodule)
    datamodule.load_state_dict(state)
    rows = torch.cat([rows for _, rows in take(datamodule, len(datamodule.train_dataloader()))])
    assert len(rows.unique(dim=0)) == len(rows) == 378
    assert datamodule.state_dict()["position"]["ranks"][0]["position"]["epoch"] == 1


def test_a_cache_of_version_1_is_continued_from_its_last_sidecar(tiny: Callable[[str], str]) -> None:
    datamodule = opened(live_data(tiny("llama"), seq_length=16))
    assert datamodule.live is not None
    content = torch.load(FIXTURES / "source.pt", weights_only=True)
    extraction = datamodule.live.extraction(None)
    extraction.resume = Resume(content["source"], content["row"], content["row"])
    [last] = extraction
    assert torch.equal(last.provenance, content["rows"])
    for source in (
        {},
        {"row": -1, "start": None},
        {"row": 0},
        [],
        {"start": last.source["start"], "row": "0"},
    ):
        extraction.resume = Resume(source, 0, 0)
        if source in ({}, {"row": 0}):
            assert len(list(extraction)) > 1
        else:
            with pytest.raises(DamagedShardError, match="does not say where to continue"):
                list(extraction)
    beyond = deepcopy(last.source)
    beyond["start"]["at"] = [0, 40]
    extraction.resume = Resume(beyond, 0, 0)
    with pytest.raises(ValueError, match="document 40 of part 0, beyond the end of the dataset"):
        list(extraction)
    datamodule.teardown("fit")


# ---- damage

NUMBERS = (-1, 1, 100, -100, -(10**9), 10**30, 2**62)
OTHERS = (None, True, 0.5, math.nan, "7", "", [], {}, [1, 2], {"version": 1})


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to all values inside a state."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list | tuple)
        else ()
    )
    for key, item in items:
        yield (*path, key)
        yield from nodes(item, (*path, key))


def unfrozen(value: Any) -> Any:
    """A copy with lists for tuples."""
    if isinstance(value, dict):
        return {key: unfrozen(item) for key, item in value.items()}
    return [unfrozen(item) for item in value] if isinstance(value, list | tuple) else deepcopy(value)


def damage(state: dict[str, Any], rng: random.Random) -> tuple[dict[str, Any], str]:
    """A copy of a state with one random damage, and what was done."""
    found = unfrozen(state)
    *path, last = rng.choice(list(nodes(found)))
    parent = found
    for key in path:
        parent = parent[key]
    value = parent[last]
    kind = rng.choice(["delete", "add", "value", "value", "value", "swap"])
    if kind == "delete":
        del parent[last]
    elif kind == "add":
        if isinstance(parent, dict):
            parent[rng.choice(["x", "order", "document", 7, "segment"])] = rng.choice(OTHERS)
        else:
            parent.append(deepcopy(value))
    elif kind == "swap" and isinstance(parent, dict):
        other = rng.choice(list(parent))
        parent[last], parent[other] = parent[other], parent[last]
    else:
        parent[last] = changed(value, rng)
    return found, f"{kind} at {(*path, last)}: {value!r:.40}"


def changed(value: Any, rng: random.Random) -> Any:
    """Another value, of the same type or another one."""
    if isinstance(value, Tensor):
        poisoned = value.clone()
        poisoned[rng.randrange(len(value))] = rng.choice([math.nan, math.inf, 0.0, 1.5])
        return rng.choice([poisoned, value[:-1], value.double(), value[None], value.tolist(), None, "x"])
    if type(value) is int and rng.random() < 0.7:
        digits = list(str(value))
        digits[-1] = rng.choice("0123456789")
        return rng.choice([value + rng.choice(NUMBERS), int("".join(digits)), rng.choice(NUMBERS)])
    if isinstance(value, str) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return value[:at] + rng.choice("0aZ-") + value[at + 1 :]
    if isinstance(value, list) and value and rng.random() < 0.7:
        return rng.choice([value[:-1], value * 2, value[::-1], []])
    return rng.choice(OTHERS)


def states_of_version_2(made: Made) -> dict[str, tuple[dict[str, Any], Tensor]]:
    """A state of each data module in the present version, and the rows of the three batches that follow."""
    found = {}
    for name in ("live", "scaled_live", "few", "many", "scaled", "window_many"):
        datamodule = made(name)
        fresh, _ = fixture(name, datamodule)
        datamodule.load_state_dict(fresh | {"position": None, "buffer_rows": None})
        take(datamodule, 5)
        found[name] = unfrozen(datamodule.state_dict()), next_rows(datamodule)
    return found


def check_damages(made: Made, count: int, seed: int) -> dict[str, int]:
    """Load `count` damaged states of both versions; returns how many were refused and how many gave the right data."""
    rng = random.Random(seed)
    present = states_of_version_2(made)
    former = {name: fixture(name, made(name)) for name in (*LIVE, *CACHES)}
    counts, messages = {"right": 0, "version 1 loaded": 0}, list[str]()
    for number in range(count):
        states = former if number % 2 else present
        name = rng.choice(list(states))
        state, expected = states[name]
        wrong, what = damage(state, rng)
        datamodule, words = made(name), f"damage {number} of {name}: {what}"
        try:
            datamodule.load_state_dict(wrong)
            rows = next_rows(datamodule)
        except ValueError as error:
            messages.append(str(error))
            continue
        except Exception as error:
            raise AssertionError(f"{words}: {error!r}") from error
        if states is former:
            counts["version 1 loaded"] += 1
        else:
            assert torch.equal(rows, expected), words
            counts["right"] += 1
    short = [message for message in messages if len(message) < 60]
    assert not short, short
    return counts | {"refused": len(messages)}


def test_damaged_states_are_refused_or_give_the_right_data(made: Made) -> None:
    counts = check_damages(made, 120, seed=0)
    assert counts["refused"] > 60


@pytest.mark.exhaustive
def test_many_damaged_states_are_refused_or_give_the_right_data(made: Made) -> None:
    print(check_damages(made, 2000, seed=1))


def test_a_state_without_position_after_training_is_refused(
    tiny: Callable[[str], str], tmp_path: Path
) -> None:
    datamodule = live_data(tiny("llama"))
    model = sae(datamodule)
    fit = trainer(tmp_path, max_steps=3)
    fit.fit(model, datamodule)
    fit.save_checkpoint(tmp_path / "whole.ckpt")
    checkpoint = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    state = checkpoint["ActivationDataModule"]
    state |= {"version": 1, "position": None}
    del state["digest"]
    torch.save(checkpoint, tmp_path / "lost.ckpt")
    again = trainer(tmp_path, max_steps=6)
    with pytest.raises(
        ValueError, match=r"lost\.ckpt was saved after 3 batches and its data state has no position"
    ):
        again.fit(model, live_data(tiny("llama")), ckpt_path=tmp_path / "lost.ckpt")
    trainer(tmp_path, max_steps=6).fit(
        model, live_data(tiny("llama"), resume_anyway=True), ckpt_path=tmp_path / "lost.ckpt"
    )


def test_a_state_of_other_widths_is_refused_when_validating(made: Made) -> None:
    datamodule = made("scaled")
    take(datamodule, 1)
    state = datamodule.state_dict()
    other = made("few")
    wider = deepcopy(state)
    name = next(iter(wider["scalings"]))
    wider["scalings"][name] = {key: torch.ones(17) for key in ("shift", "scale")}
    wider |= {"version": 1, "fingerprint": fingerprint(other)}
    del wider["digest"]
    with pytest.raises(ValueError, match=r"its normalisation is of rows \{.*17.*\}, and this run has rows"):
        other.load_state_dict(wider)


def test_a_state_of_another_type_is_refused(made: Made) -> None:
    with pytest.raises(ValueError, match="the checkpoint's data state cannot be used: it is a list"):
        made("few").load_state_dict([1])  # type: ignore[arg-type]
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(ValueError, match="nested too deeply"):
        made("few").load_state_dict(made("few").state_dict() | {"x": deep})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trained_on": 5}, "the checkpoint.trained_on is 5, expected an object"),
        ({"trained_on": {"model_name": 5}}, "the checkpoint.trained_on.model_name is 5, expected a string"),
        ({"hyper_parameters": [1]}, "the hyperparameters in the checkpoint are a list"),
    ],
)
def test_a_damaged_description_of_an_sae_is_refused(changes: dict[str, Any], message: str) -> None:
    model = SparseAutoencoder(d_in=4, d_sae=8, k=2)
    with pytest.raises(ValueError, match=message):
        model.on_load_checkpoint(changes)
    with pytest.raises(ValueError, match=r"StreamStatistics\.rows is -1, expected at least 0"):
        StreamStatistics().load_state_dict({"rows": -1})
