"""Start the ranks of one training on this machine, with the environment that torchrun gives to each.

`launch` forks this process and returns what a function returned on each rank. `start` starts new interpreters, for
tests that kill them.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
HANGS = 300
"""Seconds after which ranks are taken to hang. They need a few on an idle machine."""


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Environment variables of one rank of `ranks` on this machine; all of them meet at `port`."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def free_port() -> int:
    """A TCP port of this machine that nothing uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def launch(ranks: int, work: Callable[..., Any], *args: Any, seconds: float = HANGS) -> list[Any]:
    """Run `work(rank, ranks, *args)` in `ranks` forked processes and return the result of each.

    Raises:
        AssertionError: a rank failed, or they did not end within `seconds`.
    """
    port = free_port()
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
    processes = [
        context.Process(target=_main, args=(rank, ranks, port, pipes[rank][1], work, args), daemon=True)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    deadline, results = time.monotonic() + seconds, []
    try:
        for receive, _ in pipes:
            assert receive.poll(max(0.0, deadline - time.monotonic())), f"{ranks} ranks hang"
            failed, result = receive.recv()
            assert not failed, result
            results.append(result)
    finally:
        for process in processes:
            process.join(10.0 if len(results) == ranks else 0.0)
            process.kill()
    return results


def start(
    module: str, *words: str, folder: Path, ranks: int | None = None, **environment: str
) -> list[subprocess.Popen[bytes]]:
    """Start `python -m module words` from the root of the repository: once, or as each of `ranks` ranks.

    What a rank prints is appended to `log-<rank>.txt` in `folder`.
    """
    port, processes = free_port(), []
    for rank in range(ranks or 1):
        given = rank_environment(rank, ranks, port) if ranks else {}
        with (folder / f"log-{rank}.txt").open("ab") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", module, *words],
                    cwd=ROOT,
                    env=os.environ | given | environment,
                    stdout=log,
                    stderr=log,
                )
            )
    return processes


def _main(
    rank: int, ranks: int, port: int, pipe: Any, work: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(HANGS - 20, file=sys.__stderr__)
    os.environ.update(rank_environment(rank, ranks, port))
    try:
        pipe.send((False, work(rank, ranks, *args)))
    except BaseException:
        pipe.send((True, traceback.format_exc()))
        raise
