"""Real processes that stand as the ranks of one training, as torchrun would have started them."""

from __future__ import annotations

import faulthandler
import logging
import multiprocessing
import os
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from deeplens_lightning.datamodule import ActivationDataModule
from tests.support.running import Recorder, trainer


def launch(ranks: int, work: Callable[..., Any], *args: Any, seconds: float = 90.0) -> list[Any]:
    """Run `work(rank, ranks, *args)` in so many processes and return what each returned.

    Raises:
        AssertionError: one failed, or they did not end in time: no test hangs.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
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
            process.join(2.0 if len(results) == ranks else 0.0)
            process.kill()
    return results


def _main(
    rank: int, ranks: int, port: int, pipe: Any, work: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(40, file=sys.__stderr__)
    given = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "GROUP_RANK": 0,
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "test",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    os.environ.update({name: str(value) for name, value in given.items()})
    try:
        pipe.send((False, work(rank, ranks, *args)))
    except BaseException:
        pipe.send((True, traceback.format_exc()))
        raise


class Mean(L.LightningModule):
    """Learns the mean row: the least that trains."""

    def __init__(self, d_in: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(d_in))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return ((batch - self.mean) ** 2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Messages(logging.Handler):
    """Keeps what was logged."""

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
    """Train as one of the ranks.

    Returns:
        `batches` (the rows of each), `rows` (provenance of each), `dropped`, `messages`, `state`, `scaling`.
    """
    recorder, messages, dm = Recorder(), Messages(), make()
    recorder.on_train_batch_end = lambda *_, **__: None  # type: ignore[method-assign]
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
