"""Train on two ranks of this machine, each in a process of its own, and compare their weights.

In: a `Subject`. Out: a `Check`. The ranks are two GPUs where there are two, otherwise two processes on the CPU. They
train on the demo model, because each loads a copy.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from deeplens_lightning.cli.doctor.subject import Found, Sizes, Subject, check
from deeplens_lightning.disk.files import write_whole

RANKS = 2

DOCUMENTS = 400
"""Documents that both ranks together train on, again and again."""

Work = Callable[[int, int, str, str, Sizes, list[str]], None]
"""What a rank runs: `train_rank`, or a function with the same arguments."""


@check(
    "two ranks",
    target="they end, with equal weights",
    advice="train on one rank (--trainer.devices=1), and report the message",
)
def two_ranks(subject: Subject, start: Literal["spawn", "fork"] = "spawn", work: Work | None = None) -> Found:
    """Train on two ranks until both end, and compare their weights bit for bit.

    Args:
        subject: what is checked; its model is not used.
        start: how processes are started.
        work: what a rank runs; None for `train_rank`.
    """
    kind = "cuda" if subject.device.type == "cuda" and torch.cuda.device_count() >= RANKS else "cpu"
    where = f"2 processes on {'2 GPUs' if kind == 'cuda' else 'the CPU'}"
    with TemporaryDirectory() as folder:
        given = (folder, kind, subject.sizes, subject.documents(DOCUMENTS))
        problem = _run(start, work or train_rank, *given)
        if problem is not None:
            return Found(passed=False, figure=f"{where}: {problem}")
        ended = [json.loads(_result(folder, rank).read_text()) for rank in range(RANKS)]
    equal = len({one["weights"] for one in ended}) == 1
    steps = [one["steps"] for one in ended]
    return Found(
        passed=equal and min(steps) == max(steps) == subject.sizes.steps,
        figure=f"{where}: steps {steps}, weights {'equal' if equal else 'differ'}",
        values={"ranks": ended, "devices": kind},
    )


def train_rank(rank: int, port: int, folder: str, kind: str, sizes: Sizes, texts: list[str]) -> None:
    """Train as one rank, and write the number of steps and a digest of the weights to a file.

    Args:
        rank: number of this rank.
        port: TCP port at which the ranks meet.
        folder: folder of the results and the logs.
        kind: "cuda" or "cpu".
        sizes: sizes of the training.
        texts: the documents.
    """
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "doctor",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's own name may not resolve
    torch.set_num_threads(1)
    with _log(folder, rank).open("w") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    subject = Subject(device=torch.device(kind, rank) if kind == "cuda" else torch.device(kind), sizes=sizes)
    data = subject.data(dataset_name=texts)
    sae = subject.sae(data)
    trainer = subject.trainer(folder, accelerator=kind, devices=RANKS, strategy="ddp")
    trainer.fit(sae, data)
    digest = hashlib.sha256()
    for parameter in sae.parameters():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    result = {"steps": trainer.global_step, "weights": digest.hexdigest()}
    write_whole(_result(folder, rank), json.dumps(result).encode())


def _run(start: str, work: Work, folder: str, kind: str, sizes: Sizes, texts: list[str]) -> str | None:
    """Run all ranks; returns what went wrong, or None. No process is left behind."""
    context: Any = multiprocessing.get_context(start)
    port = _free_port()
    processes = [
        context.Process(target=work, args=(rank, port, folder, kind, sizes, texts), daemon=True)
        for rank in range(RANKS)
    ]
    deadline = time.monotonic() + sizes.rank_seconds
    for process in processes:
        process.start()
    try:
        running = list(processes)
        while running and (left := deadline - time.monotonic()) > 0:
            wait([process.sentinel for process in running], timeout=left)
            running = [process for process in running if process.is_alive()]
            for rank, process in enumerate(processes):
                if process.exitcode:
                    return f"rank {rank} ended with {process.exitcode}: {_last_line(folder, rank)}"
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        return f"rank(s) {hung} did not end within {sizes.rank_seconds:g} s" if hung else None
    finally:
        for process in processes:
            process.kill()
            process.join()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _result(folder: str, rank: int) -> Path:
    return Path(folder) / f"rank-{rank}.json"


def _log(folder: str, rank: int) -> Path:
    return Path(folder) / f"rank-{rank}.txt"


def _last_line(folder: str, rank: int) -> str:
    """The last line that a rank printed: the message of its error."""
    path = _log(folder, rank)
    lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    return next((line for line in reversed(lines) if line.strip()), "it printed nothing")
