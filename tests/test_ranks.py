"""Several ranks: the documents of each, the common end of an epoch, and resuming on another number of ranks."""

from __future__ import annotations

import logging
import re
import resource
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from deeplens_lightning.datamodule import ActivationDataModule
from deeplens_lightning.options import BufferOptions, ModelOptions
from deeplens_lightning.shards import verify
from deeplens_lightning.text.documents import Documents
from deeplens_lightning.text.sources import open_source
from tests.support.ranks import HANGS, launch, start
from tests.support.recorder import Recorder, provenance
from tests.support.texts import texts
from tests.support.training import data, sae, trainer

FIELDS = {"val_fraction": 0.0, "tokenizer": None}


class Mean(L.LightningModule):
    """A minimal module: it learns the mean row."""

    def __init__(self, d_in: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(d_in))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return ((batch - self.mean) ** 2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Messages(logging.Handler):
    """Store the messages that are logged."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def fit(
    rank: int,
    ranks: int,
    folder: Path,
    make: Callable[[], ActivationDataModule],
    ckpt_path: str | None = None,
    save_to: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train a `Mean` as one of the ranks.

    Returns:
        `batches`, `rows` (the provenance of each batch), `dropped`, `messages`, `state`, `scaling`.
    """
    recorder, messages, dm = Recorder(), Messages(), make()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addHandler(messages)
    kept: dict[str, Any] = {}

    class Last(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            kept["dropped"] = dm.serving.loader.rows_dropped if dm.serving.loader is not None else 0

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
            if save_to is not None and trainer.global_step == options["max_steps"]:
                trainer.save_checkpoint(save_to)

    strategy = {"strategy": "ddp", "devices": ranks} if ranks > 1 else {}
    length = {} if "max_steps" in options else {"max_epochs": 1}
    run = trainer(folder, recorder, [Last()], limit_val_batches=0, **(strategy | length | options))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        run.fit(Mean(dm.d_in), dm, ckpt_path=ckpt_path)  # type: ignore[arg-type]
    return {
        "batches": [batch.numpy() for batch, _ in recorder.batches],
        "rows": [rows.numpy() for _, rows in recorder.batches],
        "dropped": kept["dropped"],
        "messages": messages.texts + [str(w.message) for w in warned],
        "state": dm.state_dict()["position"],
        "scaling": dm.scaling.shift.numpy() if dm.scaling is not None else None,
    }


def tokens(lengths: list[int], shards: int = 1) -> Any:
    """Different pretokenised documents of these lengths; with several shards, one part after another."""
    rng = np.random.default_rng(0)
    dataset = datasets.Dataset.from_dict({"text": [rng.integers(1, 600, n).tolist() for n in lengths]})
    return dataset if shards == 1 else dataset.to_iterable_dataset(num_shards=shards)


def served(results: list[dict[str, Any]]) -> list[Counter[tuple[int, int]]]:
    """How often each rank was served each token, by document and position."""
    return [Counter((int(r[0]), int(r[2])) for rows in one["rows"] for r in rows) for one in results]


def again(results: list[dict[str, Any]]) -> int:
    """The number of rows that are served again, from the log message."""
    (found,) = (
        int(n) for one in results for m in one["messages"] for n in re.findall(r"(\d+) rows are served", m)
    )
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("shards", [1, 4])
def test_each_document_goes_to_exactly_one_rank(ranks: int, shards: int) -> None:
    whole = [text for text in texts(90) if text.strip()]
    dataset: Any = datasets.Dataset.from_dict({"text": [list(text.encode()) for text in whole]})
    if shards > 1:
        dataset = dataset.to_iterable_dataset(num_shards=shards)
    got = [
        [
            document.index
            for document in Documents(
                source=open_source(dataset),
                split="train",
                val_fraction=0.0,
                seed=1,
                rank=rank,
                ranks=ranks,
            ).read(0)
        ]
        for rank in range(ranks)
    ]
    assert len(set().union(*got)) == sum(map(len, got)) == len(whole)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_serve_every_row_once_and_count_what_they_drop(ranks: int, tiny: Any, tmp_path: Path) -> None:
    lengths = [5 + 7 * i % 60 for i in range(70)]
    make = partial(data, tiny("gpt2"), tokens(lengths), normalize="zscore", **FIELDS)
    results = launch(ranks, fit, tmp_path, make, None, None)
    counts = served(results)
    assert max(sum(counts, Counter()).values()) == 1, "a row was served twice"
    owners = [{document for document, _ in count} for count in counts]
    assert sum(map(len, owners)) == len(set().union(*owners)), "a document is on two ranks"
    assert len({len(one["rows"]) for one in results}) == 1, "ranks end at different steps"
    dropped = results[0]["dropped"]
    assert sum(sum(count.values()) for count in counts) + dropped == sum(lengths)
    assert all(one["dropped"] == dropped for one in results)
    assert all(np.array_equal(one["scaling"], results[0]["scaling"]) for one in results)
    assert results[0]["state"] == results[1]["state"], "the states of the ranks differ"
    if dropped:
        assert any(f"{dropped} rows of this epoch are dropped" in m for m in results[0]["messages"])


def test_ranks_with_unequal_text_end_an_epoch_together(tiny: Any, tmp_path: Path) -> None:
    lengths = [30] * 3 + [300] * 3  # two shards: one rank gets a tenth of what the other gets
    make = partial(data, tiny("gpt2"), tokens(lengths, shards=2), **FIELDS)
    results = launch(2, fit, tmp_path, make, None, None)
    rows = [sum(len(rows) for rows in one["rows"]) for one in results]
    assert sorted(rows) == [90, 96]  # six batches each, the last one of the rank with less text is short
    assert [one["dropped"] for one in results] == [990 - sum(rows)] * 2
    both = launch(2, partial(fit, max_epochs=3), tmp_path, make, None, None)
    assert [one["dropped"] for one in both] == [3 * (990 - sum(rows))] * 2


def test_two_ranks_resume_bit_for_bit(tiny: Any, tmp_path: Path) -> None:
    make = partial(data, tiny("gpt2"), texts(60))
    whole = launch(2, partial(fit, max_steps=40), tmp_path, make, None, None)
    path = str(tmp_path / "a.ckpt")
    launch(2, partial(fit, max_steps=13), tmp_path, make, None, path)
    rest = launch(2, partial(fit, max_steps=40), tmp_path, make, path, None)
    for one, other in zip(whole, rest, strict=True):
        assert len(one["batches"]) == 13 + len(other["batches"])
        assert all(np.array_equal(a, b) for a, b in zip(one["batches"][13:], other["batches"], strict=True))


LENGTHS = {
    "alike": ([40] * 40, 1),
    "tenfold by rank": ([200] * 10 + [20] * 10, 2),
    "tenfold by document": ([20, 200] * 12, 1),
}


@pytest.mark.parametrize(
    ("before", "after", "lengths"),
    [(2, 1, "alike"), (2, 1, "tenfold by rank"), (2, 1, "tenfold by document"), (1, 2, "alike"),
     (1, 2, "tenfold by rank"), (1, 2, "tenfold by document"), (2, 3, "tenfold by document")],
)  # fmt: skip
def test_resuming_on_another_number_of_ranks_loses_no_row_and_counts_repeated_ones(
    before: int, after: int, lengths: str, tiny: Any, tmp_path: Path
) -> None:
    counts, shards = LENGTHS[lengths]
    make = partial(data, tiny("gpt2"), tokens(counts, shards), **FIELDS)
    path = str(tmp_path / "a.ckpt")
    first = served(launch(before, partial(fit, max_steps=11), tmp_path, make, None, path))
    results = launch(after, fit, tmp_path, make, path, None)
    rest = served(results)
    announced, dropped = again(results), results[0]["dropped"]
    one, two = sum(first, Counter()), sum(rest, Counter())
    assert max(two.values()) == 1
    assert one.total() + two.total() + dropped == sum(counts) + announced
    assert len(one | two) >= sum(counts) - dropped, "rows are lost"
    if not dropped:
        assert sum((one & two).values()) == announced


def test_the_number_of_ranks_can_change_twice_without_losing_a_row(tiny: Any, tmp_path: Path) -> None:
    counts = [90] * 30
    make = partial(data, tiny("gpt2"), tokens(counts), **FIELDS)
    a, b = str(tmp_path / "a.ckpt"), str(tmp_path / "b.ckpt")
    one = served(launch(2, partial(fit, max_steps=20), tmp_path, make, None, a))
    second = launch(1, partial(fit, max_steps=23), tmp_path, make, a, b)
    third = launch(2, fit, tmp_path, make, b, None)
    rows = sum(one, Counter()), sum(served(second), Counter()), sum(served(third), Counter())
    twice = again(second) + again(third)
    assert sum(count.total() for count in rows) + third[0]["dropped"] == sum(counts) + twice
    assert len(rows[0] | rows[1] | rows[2]) >= sum(counts) - third[0]["dropped"]


@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn", "ddp_fork"])
def test_ranks_that_lightning_starts_itself_share_the_rows(strategy: str, tiny: Any, tmp_path: Path) -> None:
    words = ("tests.support.lightning_ranks", strategy, str(tmp_path), tiny("gpt2"))
    (process,) = start(*words, folder=tmp_path, OMP_NUM_THREADS="1")
    assert process.wait(HANGS) == 0, (tmp_path / "log-0.txt").read_text()
    rows = [torch.load(tmp_path / f"rows-{rank}.pt", weights_only=True) for rank in range(2)]
    owners = [set(one[:, 0].tolist()) for one in rows]
    batches = [-(-len(one) // 16) for one in rows]  # the last one of a rank can be short
    assert batches[0] == batches[1] > 0, "ranks end at different steps"
    assert not owners[0] & owners[1], "a document is on two ranks"
    dm = data(tiny("gpt2"))
    dm.setup("fit")
    whole = torch.cat([provenance(dm, batch) for batch in dm.train_dataloader()])
    dm.teardown("fit")
    counts = Counter(map(tuple, whole[:, [0, 2]].tolist()))
    mine = Counter(map(tuple, torch.cat(rows)[:, [0, 2]].tolist()))
    assert mine <= counts, "a row is not of the text, or is served twice"


def _written(
    rank: int, ranks: int, folder: Path, lm: str, lengths: list[int], prefetch: int
) -> dict[str, Any]:
    """Train three epochs with a cache written in the first one."""
    text, cache, options = (
        tokens(lengths, shards=2),
        str(folder / "cache"),
        BufferOptions(shuffle_blocks=False),
    )
    make = partial(data, lm, text, write_shards=cache, prefetch=prefetch, buffer_options=options, **FIELDS)
    return fit(rank, ranks, folder, make, max_epochs=3)


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize(
    "lengths", [[30] * 3 + [300] * 3, [30] * 3 + [1500] * 3, [64] * 12], ids=["unequal", "far apart", "equal"]
)
def test_ranks_write_a_cache_in_the_first_epoch_and_read_all_of_it_later(
    lengths: list[int], prefetch: int, tiny: Any, tmp_path: Path
) -> None:
    results = launch(2, _written, tmp_path, tiny("gpt2"), lengths, prefetch, seconds=60)
    assert verify(str(tmp_path / "cache")).problems == []
    assert len({len(one["rows"]) for one in results}) == 1, "ranks end at different steps"
    counts = sum(served(results), Counter())
    assert len(counts) == sum(lengths), "a row was never served"
    assert set(counts.values()) <= {2, 3}, "a row was served twice in an epoch"
    assert sum(count == 2 for count in counts.values()) == results[0]["dropped"]


def _opening(rank: int, ranks: int, folder: Path, lm: str, fault: str) -> str:
    """Train with a data module that differs on rank 1; return the error of this rank."""
    dataset = "/no/such.jsonl" if (rank, fault) == (1, "file") else texts(60)
    options = ModelOptions(isolation="padded" if (rank, fault) == (1, "isolation") else "auto")
    dm = data(lm, dataset, model_options=options, val_fraction=0.0)
    run = trainer(folder, strategy="ddp", devices=ranks, max_steps=1, limit_val_batches=0)
    try:
        run.fit(Mean(dm.d_in), dm)  # type: ignore[arg-type]
    except Exception as error:  # noqa: BLE001  returned and compared
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_a_rank_that_cannot_open_its_data_ends_all_ranks(tiny: Any, tmp_path: Path) -> None:
    first, second = launch(2, _opening, tmp_path, tiny("gpt2"), "file", seconds=60)
    assert second.startswith("FileNotFoundError: ")
    assert first.startswith("RankError: rank 1 failed with FileNotFoundError: ")


def test_ranks_that_keep_segments_apart_in_different_ways_are_refused(tiny: Any, tmp_path: Path) -> None:
    found = launch(2, _opening, tmp_path, tiny("gpt2"), "isolation", seconds=60)
    assert all("different ways, by rank: packed, padded" in one for one in found)


def _faulty(rank: int, ranks: int, folder: Path, lm: str, fault: str) -> str:
    """Train until a fault on rank 1 ends the run; return the error of this rank."""
    many = tokens([40] if fault == "documents" else [200] * 40)
    dm = data(lm, many, write_shards=str(folder / "cache") if fault == "disk" else None, **FIELDS)
    if rank == 1 and fault == "disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**13, resource.RLIM_INFINITY))
    if rank == 1 and fault == "tokens":
        dataset = datasets.Dataset.from_dict({"text": [[700] * 50] * 80})  # beyond the vocabulary of 600
        dm = data(lm, dataset, **FIELDS)
    run = trainer(folder, strategy="ddp", devices=ranks, max_epochs=2, limit_val_batches=0)
    messages = Messages()
    logging.getLogger("deeplens_lightning").addHandler(messages)
    try:
        run.fit(Mean(dm.d_in), dm)  # type: ignore[arg-type]
    except Exception as error:  # noqa: BLE001  returned and compared
        return "\n".join([f"{type(error).__name__}: {error}", *messages.texts])
    return "no error"


@pytest.mark.filterwarnings("ignore:a rank has no more rows:UserWarning")
@pytest.mark.parametrize(
    ("fault", "message", "elsewhere"),
    [
        (
            "tokens",
            "ValueError: token id 700 is beyond",
            "RankError: rank 1 failed with ValueError: token id 700 is beyond",
        ),
        (
            "disk",
            "DiskFullError: no space for the next shard",
            "look for the first error of all ranks",  # the other rank was in the middle of a step
        ),
        (
            "documents",
            "ValueError: no rows to train on",
            "there are fewer documents than ranks",
        ),
    ],
)
def test_a_fault_on_one_rank_ends_all_ranks(
    fault: str, message: str, elsewhere: str, tiny: Any, tmp_path: Path
) -> None:
    first, second = launch(2, _faulty, tmp_path, tiny("gpt2"), fault, seconds=60)
    assert second.startswith(message)
    assert elsewhere in first


def _alone(rank: int, ranks: int, folder: Path, lm: str) -> list[int]:
    """Rank 0 alone reads the length of a loader and the normalisation."""
    found: list[int] = []

    class Reads(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
            if trainer.global_rank == 0 and trainer.global_step == 2:
                assert dm.scaling is not None
                found.append(len(dm.val_dataloader()))  # type: ignore[arg-type]

        def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
            found.append(-1)

    dm = data(lm, normalize="zscore", val_rows=40)
    run = trainer(
        folder,
        None,
        [Reads()],
        strategy="ddp",
        devices=ranks,
        max_steps=4,
        val_check_interval=4,
        check_val_every_n_epoch=None,
    )
    run.fit(sae(dm), dm)
    return found


def test_one_rank_alone_can_read_lengths_and_the_normalisation(tiny: Any, tmp_path: Path) -> None:
    first, second = launch(2, _alone, tmp_path, tiny("gpt2"), seconds=60)
    assert first[0] == len(first) - 1 == len(second) > 0


class Replicated(Mean):
    """A `Mean` that a model-parallel strategy accepts."""

    def configure_model(self) -> None:
        """Nothing is sharded."""


def _model_parallel(rank: int, ranks: int, folder: Path, make: Callable[[], ActivationDataModule]) -> Any:
    dm, recorder = make(), Recorder()
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=2)
    run = trainer(folder, recorder, strategy=strategy, devices=ranks, max_epochs=1, limit_val_batches=0)
    run.fit(Replicated(dm.d_in), dm)  # type: ignore[arg-type]
    ranks_in_state = len(dm.state_dict()["position"]["ranks"])
    return {"rows": [rows.numpy() for _, rows in recorder.batches], "ranks": ranks_in_state}


@pytest.mark.filterwarnings("ignore:a rank has no more rows:UserWarning")
def test_processes_that_share_a_sharded_module_get_the_same_rows(tiny: Any, tmp_path: Path) -> None:
    lengths = [5 + 7 * i % 60 for i in range(40)]
    make = partial(data, tiny("gpt2"), tokens(lengths), normalize="zscore", **FIELDS)
    a, a_too, b, b_too = launch(4, _model_parallel, tmp_path, make)
    for one, other in ((a, a_too), (b, b_too)):
        assert all(np.array_equal(x, y) for x, y in zip(one["rows"], other["rows"], strict=True))
    assert {one["ranks"] for one in (a, a_too, b, b_too)} == {2}, "a checkpoint counts processes as ranks"
    counts = sum(served([a, b]), Counter())
    assert max(counts.values()) == 1, "a row was served to both"
    assert counts.total() > 0.8 * sum(lengths)
