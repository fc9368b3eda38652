"""Run jobs in forked processes that count their steps on the disk, or kill themselves before a chosen one.

The processes are forked from the fork server of `conftest.processes`, which has imported this module and has started no
thread: a job takes a fraction of a second.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from deeplens_lightning.cli.newest_checkpoint import newest_checkpoint
from deeplens_lightning.disk.files import watch
from deeplens_lightning.extraction.predict import run
from tests.support.ranks import free_port, rank_environment
from tests.support.texts import texts
from tests.support.training import data, sae, trainer

CACHE, KEPT, TEMPORARY, FINAL = "cache", "kept", "tmp", "final-{}.pt"
EVERY = 7
"""Number of steps between two checkpoints of `train`."""
Step = tuple[str, str]
"""Name of a step and the path that it changes."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of a job.

    Attributes:
        name: a key of `JOBS`.
        folder: everything is written there.
        model: folder of the model.
        ranks: number of its processes.
        dies: the rank that kills itself; the others are killed when it has, as a scheduler does.
        at: number of the step before which it kills itself; None to run to the end.
    """

    name: str
    folder: Path
    model: str
    ranks: int = 1
    dies: int = 0
    at: int | None = None


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a job ended.

    Attributes:
        codes: exit code of each rank, negative for a signal.
        steps: steps of each rank; none if a rank was killed or failed.
        log: the end of what each rank printed.
    """

    codes: list[int | None]
    steps: list[list[Step]]
    log: str


def start(job: Job, processes: ForkServerContext) -> Ended:
    """Run a job in processes of their own, and wait until they have ended."""
    (job.folder / TEMPORARY).mkdir(parents=True, exist_ok=True)
    port = free_port()
    ranks = [
        processes.Process(target=_rank, args=(job, rank, port), daemon=True) for rank in range(job.ranks)
    ]
    for rank in ranks:
        rank.start()
    while running := [rank for rank in ranks if rank.is_alive()]:
        wait([rank.sentinel for rank in running])
        if any(rank.exitcode for rank in ranks):
            for rank in ranks:
                rank.kill()
    codes = [rank.exitcode for rank in ranks]
    shutil.rmtree(job.folder / TEMPORARY)
    logs = [(job.folder / f"log-{rank}.txt").read_text()[-3000:] for rank in range(job.ranks)]
    found = [] if any(codes) else [_steps(job.folder, rank).read_text() for rank in range(job.ranks)]
    steps = [[(step, path) for step, path in json.loads(text)] for text in found]
    return Ended(codes=codes, steps=steps, log="\n".join(logs))


def steps_of(work: Callable[[], object]) -> list[Step]:
    """Do some work in this process; returns its steps."""
    steps = Steps(None)
    watch(steps)
    try:
        work()
    finally:
        watch(None)
    return steps.seen


def killed(at: int, work: Callable[[], object], processes: ForkServerContext) -> None:
    """Do some work in a process that kills itself before its step `at`."""
    process = processes.Process(target=_die, args=(at, work))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def _die(at: int, work: Callable[[], object]) -> None:
    watch(Steps(at))
    work()


def extract(folder: Path, model: str, ranks: int) -> None:
    """Write a cache of several shards."""
    dm = data(model, texts(12), hook="mlp_out", val_fraction=0.0, val_rows=0)
    run(dm, str(folder / CACHE), shard_bytes=30_000, accelerator="cpu", devices=ranks)


def train(folder: Path, model: str, ranks: int) -> None:
    """Train two epochs, of which the first one writes a cache; continue from the newest checkpoint."""
    settings: dict[str, Any] = {"write_shards": str(folder / CACHE), "batch_size": 32, "hook": "mlp_out"}
    dm = data(model, texts(14 * ranks), normalize="zscore", **settings)
    saving = ModelCheckpoint(folder / KEPT, every_n_train_steps=EVERY, save_last=True, filename="{step}")
    strategy = "ddp" if ranks > 1 else "auto"
    fit = trainer(
        folder, callbacks=[saving], max_epochs=2, limit_val_batches=1, strategy=strategy, devices=ranks
    )
    module = sae(dm)
    fit.fit(module, dm, ckpt_path=newest_checkpoint(folder))
    final = {"weights": module.state_dict(), "optimizer": fit.optimizers[0].state_dict()}
    torch.save(final, folder / FINAL.format(fit.global_rank))


JOBS: Mapping[str, Callable[[Path, str, int], None]] = {"extract": extract, "train": train}


class Steps:
    """Count the steps of this process, and kill it before step `at`."""

    def __init__(self, at: int | None) -> None:
        self.at, self.seen = at, list[Step]()

    def __call__(self, step: str, path: str) -> None:
        if len(self.seen) == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen.append((step, path))


EVENTS = {"os.rename": "replace", "os.remove": "remove", "os.rmdir": "remove", "os.mkdir": "make folder"}
"""The name of the step for each event of Python's audit hooks, besides `open`, that changes a disk."""


@contextmanager
def changes_seen(steps: Steps, folder: Path) -> Iterator[None]:
    """Count Lightning's changes of its checkpoints as steps too; check that those of the cache are announced.

    Raises:
        AssertionError: a file of the cache was changed without an announced step.
    """
    hidden = list[Step]()
    active = [True]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if not active or not (event in EVENTS or (event == "open" and args[2] & (os.O_CREAT | os.O_TRUNC))):
            return
        path = args[1] if event == "os.rename" else args[0]
        if not isinstance(path, str | os.PathLike):
            return
        path = os.fspath(path)
        inside = Path(path).relative_to(folder).parts[:1] if path.startswith(str(folder) + os.sep) else ()
        if inside in ((KEPT,), (TEMPORARY,)):
            steps(f"Lightning: {event}", path)
        names = ("create", "append") if event == "open" else (EVENTS[event],)
        if inside == (CACHE,) and not any((name, path) in steps.seen[-1:] for name in names):
            hidden.append((event, path))

    sys.addaudithook(hook)
    try:
        yield
    finally:
        active.clear()
    assert not hidden, f"changes of the cache that no step announces: {hidden}"


def _steps(folder: Path, rank: int) -> Path:
    return folder / f"steps-{rank}.json"


def _rank(job: Job, rank: int, port: int) -> None:
    torch.set_num_threads(1)
    with (job.folder / f"log-{rank}.txt").open("w") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    code = 1
    try:
        if sys.platform == "linux":
            threads = list(Path(f"/proc/{os.getppid()}/task").iterdir())
            assert len(threads) == 1, "a process with threads was forked"
        tempfile.tempdir = str(job.folder / TEMPORARY)
        if job.ranks > 1:
            os.environ |= rank_environment(rank, job.ranks, port)
        steps = Steps(job.at if rank == job.dies else None)
        watch(steps)
        with changes_seen(steps, job.folder):
            JOBS[job.name](job.folder, job.model, job.ranks)
        _steps(job.folder, rank).write_text(json.dumps(steps.seen))
        code = 0
    except BaseException:  # noqa: BLE001  printed; the code says that it failed
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
