"""The promises hold in combination: rows once, bits equal, provenance there, nothing left behind.

Each case of the walk is one way of training. Together the cases have every pair of values of any two settings. Each is
compared, bit for bit, with the plainest way to train on the same rows.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import combinations, product
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM

from deeplens_lightning.callbacks import LossRecovered
from deeplens_lightning.datamodule import ActivationDataModule
from deeplens_lightning.options import ModelOptions
from deeplens_lightning.sae import SparseAutoencoder
from deeplens_lightning.shards import verify
from tests.support.ranks import launch
from tests.support.texts import texts
from tests.support.training import data, sae, trainer

STOP = 9
"""Batches before the checkpoint that a case resumes from."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to train. The first value of each setting is the plainest."""

    source: str = "live"
    prefetch: int = 0
    ranks: int = 1
    moved: bool = False
    handed_in: bool = False
    callbacks: bool = False
    dtype: str = "float32"
    resumed: bool = False

    @property
    def plainest(self) -> Case:
        """The case that serves the same rows in the plainest way."""
        return Case(source=self.source, ranks=self.ranks, dtype=self.dtype)

    def __str__(self) -> str:
        return "-".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))


VALUES: dict[str, tuple[Any, ...]] = {
    "source": ("live", "cached", "write-through"),
    "prefetch": (0, 2),
    "ranks": (1, 2),
    "moved": (False, True),
    "handed_in": (False, True),
    "callbacks": (False, True),
    "dtype": ("float32", "bfloat16"),
    "resumed": (False, True),
}


def pairs(values: tuple[Any, ...]) -> set[tuple[Any, ...]]:
    return set(combinations(zip(VALUES, values, strict=True), 2))


def walk() -> Iterator[Case]:
    """Cases that have every pair of values of two settings; each is the one with the most pairs that are missing."""
    everything = list(product(*VALUES.values()))
    missing = set().union(*map(pairs, everything))
    while missing:
        best = max(everything, key=lambda values: len(pairs(values) & missing))
        missing -= pairs(best)
        yield Case(**dict(zip(VALUES, best, strict=True)))


class Moved(ActivationDataModule):
    """Batches are copied on their way, as to an accelerator."""

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch.clone()


class Watch(L.Callback):
    """Store the training batches of each data epoch, and look up the provenance of every batch."""

    def __init__(self, save_at: int | None, path: Path) -> None:
        self.batches: list[tuple[int, NDArray[np.float32], NDArray[np.int64]]] = []
        self.validated = 0
        self.save_at, self.path = save_at, path

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Tensor, batch_idx: int) -> None:
        where = trainer.datamodule.provenance(batch)
        assert where is not None, "a training batch has no provenance"
        epoch = trainer.datamodule.serving.loader._position.epoch
        self.batches.append((epoch, batch.float().numpy(), where.stacked().numpy()))

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Tensor, *_: Any) -> None:
        where = trainer.datamodule.provenance(batch)
        assert where is not None, "a validation batch has no provenance"
        assert len(where.position) == len(batch)
        self.validated += len(batch)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        if trainer.global_step == self.save_at:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def train(rank: int, ranks: int, folder: Path, lm: str, cache: str, case: Case) -> dict[str, Any]:
    """Train two data epochs in the way of a case; a case that resumes stops after `STOP` batches and goes on."""
    model: Any = lm
    if case.handed_in and case.source != "cached":
        model = AutoModelForCausalLM.from_pretrained(lm, dtype=case.dtype).train()
    found = []
    for stop in (STOP, None) if case.resumed else (None,):
        dm = module_of(model, lm, cache, case, folder)
        watch = Watch(stop, folder / "walk.ckpt")
        extra: list[L.Callback] = [watch]
        if case.callbacks:
            held_out = texts(3) if case.source == "cached" else ()
            source = model if case.handed_in else lm
            extra.append(LossRecovered(rows=64, device="cpu", hf_model=source, texts=held_out))
        run = trainer(
            folder,
            callbacks=extra,
            max_epochs=2,
            val_check_interval=5,
            check_val_every_n_epoch=None,
            precision="bf16-true" if case.dtype == "bfloat16" else "32-true",
            strategy="ddp" if ranks > 1 else "auto",
            devices=ranks,
        )
        resume = str(folder / "walk.ckpt") if case.resumed and stop is None else None
        dictionary: SparseAutoencoder = sae(dm)
        run.fit(dictionary, dm, ckpt_path=resume)
        assert watch.validated, "nothing was validated"
        found += watch.batches
        assert dm.serving.opened is None
        assert dm.serving.loader is None
    left = [
        t.name for t in threading.enumerate() if t.name.startswith(("activation-producer", "shard-writer"))
    ]
    assert not left, f"threads are left: {left}"
    if not isinstance(model, str):
        modules = list(model.modules())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules), (
            "hooks are left on the model"
        )
        assert all(m.training for m in modules), "the model's training mode was changed"
    return {"batches": found}


def module_of(model: Any, lm: str, cache: str, case: Case, folder: Path) -> ActivationDataModule:
    kind = Moved if case.moved else ActivationDataModule
    if case.source == "cached":
        return kind(shards=cache, batch_size=16, val_fraction=0.2, val_rows=64, prefetch=case.prefetch)
    options = {} if case.handed_in else {"model_options": ModelOptions(kwargs={"dtype": case.dtype})}
    written = str(folder / "written") if case.source == "write-through" else None
    return data(model, kind=kind, tokenizer=lm, prefetch=case.prefetch, write_shards=written, **options)


@pytest.fixture(scope="module")
def ways(
    tiny: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Case], list[dict[str, Any]]]:
    """Train in the way of a case, once, and return what each rank was served."""
    lm = tiny("gpt2")
    caches: dict[str, str] = {}
    done: dict[Case, list[dict[str, Any]]] = {}

    def cache_of(dtype: str) -> str:
        if dtype not in caches:
            caches[dtype] = str(tmp_path_factory.mktemp("cache"))
            dm = module_of(lm, lm, "", Case(source="write-through", dtype=dtype), Path(caches[dtype]))
            dm.setup("fit")
            list(dm.train_dataloader())
            dm.teardown("fit")
            caches[dtype] += "/written"
        return caches[dtype]

    def way(case: Case) -> list[dict[str, Any]]:
        if case not in done:
            folder = tmp_path_factory.mktemp("walk")
            args = (folder, lm, cache_of(case.dtype), case)
            done[case] = launch(case.ranks, train, *args) if case.ranks > 1 else [train(0, 1, *args)]
            if case.source == "write-through":
                assert verify(str(folder / "written")).problems == []
        return done[case]

    return way


def rows_of(ranks: list[dict[str, Any]], epoch: int) -> Counter[tuple[int, int]]:
    return Counter(
        (int(row[0]), int(row[2]))
        for rank in ranks
        for number, _, provenance in rank["batches"]
        if number == epoch
        for row in provenance
    )


CASES = list(walk())


def test_the_walk_has_every_pair_of_values() -> None:
    found = set().union(*(pairs(tuple(getattr(case, name) for name in VALUES)) for case in CASES))
    assert found == set().union(*map(pairs, product(*VALUES.values())))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:a rank has no more rows:UserWarning")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_pair_of_settings_serves_the_rows_of_the_plainest_way(
    case: Case, ways: Callable[[Case], list[dict[str, Any]]]
) -> None:
    found, expected = ways(case), ways(case.plainest)
    for rank, plain in zip(found, expected, strict=True):
        assert len(rank["batches"]) == len(plain["batches"])
        for (epoch, batch, where), (epoch_, batch_, where_) in zip(
            rank["batches"], plain["batches"], strict=True
        ):
            assert epoch == epoch_
            assert np.array_equal(where, where_), "other rows, or another order"
            assert np.array_equal(batch, batch_), "other bits"
    first, second = (rows_of(found, epoch) for epoch in (0, 1))
    assert max(first.values()) == max(second.values()) == 1, "a row was served twice in an epoch"
    if case.ranks == 1:
        assert first.keys() == second.keys(), "a row was not served in an epoch"
