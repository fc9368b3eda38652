"""A process that is killed at any step on the disk leaves what the next one completes, as if nothing had happened."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch

from deeplens_lightning.shards import verify
from deeplens_lightning.shards.names import INDEX
from tests.support.caches import read_back
from tests.support.kills import CACHE, EVERY, FINAL, Job, Step, start
from tests.test_kill import assert_equal

FILE = Counter(("create", "write", "inside write", "sync", "replace", "sync folder"))
"""Steps that write one file."""


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A job that ran without a stop.

    Attributes:
        job: the job.
        steps: steps of each rank.
        train_steps: number of its training steps; 0 for a job that does not train.
    """

    job: Job
    steps: list[list[Step]]
    train_steps: int

    def gaps(self) -> list[tuple[int, int]]:
        """Pairs of a rank and a number of one of its steps."""
        return [(rank, at) for rank, steps in enumerate(self.steps) for at in range(len(steps))]


@pytest.fixture(scope="module")
def undisturbed(
    tiny: Callable[[str], str], processes: ForkServerContext, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], Whole]:
    """Run a job to its end, once."""
    done: dict[tuple[str, int], Whole] = {}

    def run(name: str, ranks: int) -> Whole:
        if (name, ranks) not in done:
            job = Job(name=name, folder=tmp_path_factory.mktemp(name), model=tiny("gpt2"), ranks=ranks)
            ended = start(job, processes)
            assert ended.codes == [0] * ranks, ended.log
            steps = 0
            if name == "train":
                final = torch.load(job.folder / FINAL.format(0), weights_only=True)
                steps = int(final["optimizer"]["state"][0]["step"])
            done[name, ranks] = Whole(job=job, steps=ended.steps, train_steps=steps)
            check_steps(done[name, ranks])
        return done[name, ranks]

    return run


def check_steps(whole: Whole) -> None:
    """Check that all steps were counted that a cache and its checkpoints need."""
    shards = list((whole.job.folder / CACHE).glob("*.pt"))
    assert len(shards) >= 3 * whole.job.ranks
    ours = sum((Counter(step for step, _ in steps) for steps in whole.steps), Counter[str]())
    saving = Counter({step: ours.pop(step) for step in list(ours) if step.startswith("Lightning")})
    files = 1 + 2 * len(shards) + whole.job.ranks + 1  # manifest, shards and sidecars, done marks, index
    once = Counter({"make folder": 1, "sync folder": 1, "append": whole.job.ranks})
    expected = Counter({step: files * n for step, n in FILE.items()}) + once
    if whole.job.ranks == 1:
        assert ours == expected
    else:  # all ranks may write the manifest, and the index
        extra = ours - expected
        assert not expected - ours
        assert all(n < 2 * whole.job.ranks for n in extra.values()), extra
    saves = whole.train_steps // EVERY
    assert saving["Lightning: os.rename"] == 2 * saves  # each one under its own name and as last.ckpt
    owners = (
        whole.job.ranks if saves else 0
    )  # a file in the temporary folder of each rank that reads the cache
    assert saving["Lightning: open"] == 4 * saves + owners  # each one is created and then opened
    assert saving["Lightning: os.remove"] == max(saves - 1, 0)
    assert not whole.train_steps or saves >= 5


def killed_and_run_again(
    whole: Whole, gaps: Sequence[tuple[int, int]], folder: Path, processes: ForkServerContext
) -> int:
    """Kill the job at each of some gaps, run it again, and compare; returns how many gaps were reached."""
    reached = 0
    for rank, at in gaps:
        where = f"killed before step {at} of rank {rank}, {whole.steps[rank][at]}"
        job = replace(whole.job, folder=folder / f"{rank}-{at}", dies=rank, at=at)
        ended = start(job, processes)
        reached += ended.codes[rank] == -9
        assert ended.codes[rank] == -9 or (job.ranks > 1 and not any(ended.codes)), f"{where}: {ended.log}"
        again = start(replace(job, at=None), processes)
        assert not any(again.codes), f"{where}: {again.log}"
        compare(job, whole.job, where)
        shutil.rmtree(job.folder)
    return reached


def compare(found: Job, expected: Job, where: str) -> None:
    """Check that a job that was killed and run again left the same as one that ran without a stop."""
    cache = found.folder / CACHE
    report = verify(cache)
    assert (report.problems, report.finished) == ([], True), where
    assert report.rows == verify(expected.folder / CACHE).rows
    unfinished = [
        path.name for path in cache.iterdir() if path.name.startswith(".") and "lock" not in path.name
    ]
    assert unfinished == [], where
    assert_equal(read_back(cache), read_back(expected.folder / CACHE), where)
    for rank in range(found.ranks if found.name == "train" else 0):
        ends = [torch.load(job.folder / FINAL.format(rank), weights_only=True) for job in (found, expected)]
        assert_equal(*ends, where)


def sample(whole: Whole, count: int) -> list[tuple[int, int]]:
    """`count` gaps, the same in every run: two from which runs did not recover before, and random ones.

    These are the gap between the done mark and the index, and one while the last rank saves its first shard, when rank 0
    may have saved its own rows and a checkpoint.
    """
    rank, path = next(
        (rank, path)
        for rank, steps in enumerate(whole.steps)
        for _, path in steps
        if Path(path).name == INDEX
    )
    before_index = whole.steps[rank].index(("replace", path)) - 4
    last = whole.job.ranks - 1
    saving = next(
        at
        for at, step in enumerate(whole.steps[last])
        if step[0] == "inside write" and step[1].endswith(".pt")
    )
    return [(rank, before_index), (last, saving), *random.Random(0).sample(whole.gaps(), count - 2)]


def test_an_extraction_killed_at_some_gap_is_completed(
    undisturbed: Callable[[str, int], Whole], tmp_path: Path, processes: ForkServerContext
) -> None:
    whole = undisturbed("extract", 1)
    assert killed_and_run_again(whole, sample(whole, 3), tmp_path, processes) == 3


@pytest.mark.slow
def test_an_extraction_killed_at_any_gap_is_completed(
    undisturbed: Callable[[str, int], Whole], tmp_path: Path, processes: ForkServerContext
) -> None:
    whole = undisturbed("extract", 1)
    gaps = whole.gaps()
    assert killed_and_run_again(whole, gaps, tmp_path, processes) == len(gaps)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "count"), [(1, 6), (2, 4)])
def test_a_training_killed_at_some_gap_ends_with_the_same_weights(
    ranks: int,
    count: int,
    undisturbed: Callable[[str, int], Whole],
    tmp_path: Path,
    processes: ForkServerContext,
) -> None:
    whole = undisturbed("train", ranks)
    assert killed_and_run_again(whole, sample(whole, count), tmp_path, processes) > 0


@pytest.mark.exhaustive
@pytest.mark.parametrize("part", range(8))
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_training_killed_at_any_gap_ends_with_the_same_weights(
    ranks: int,
    part: int,
    undisturbed: Callable[[str, int], Whole],
    tmp_path: Path,
    processes: ForkServerContext,
) -> None:
    """One of eight parts of all gaps."""
    whole = undisturbed("train", ranks)
    gaps = whole.gaps()[part::8]
    reached = killed_and_run_again(whole, gaps, tmp_path, processes)
    print(f"{reached} of {len(gaps)} gaps reached")
    assert reached == len(gaps) if ranks == 1 else reached >= len(gaps) - 2
