"""Train on the user's device: resume from a checkpoint, and count the times that the host waits for the device.

In: a `Subject`. Out: a `Check` each.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from deeplens_lightning.cli.doctor.subject import Found, Subject, check

WARM_UP = 8
"""Training steps before waits are counted: the first batch initialises the SAE, and memory is allocated."""

PRECISIONS = ("32-true", "bf16-mixed")
"""Precisions of the trainings in which waits are counted."""

WAIT = "called a synchronizing CUDA operation"
"""Torch's warning under `torch.cuda.set_sync_debug_mode("warn")`."""

PACKAGE = Path(__file__).parents[2]

Watch = Callable[[], AbstractContextManager[list[str]]]
"""A context that fills a list with the places where the host waits for the device."""


@check(
    "resume",
    target="batches bit for bit; on a CPU weights too",
    advice="do not continue runs from checkpoints on this machine, and report the versions",
)
def resume(subject: Subject) -> Found:
    """Train with a checkpoint in the middle of an epoch, continue from it, and compare batches and weights."""
    half = subject.sizes.steps // 2 + 1
    with TemporaryDirectory() as folder:
        path = Path(folder) / "middle.ckpt"
        whole, weights = _train(subject, folder, _Recorder(save_after=half, path=path))
        again, resumed = _train(subject, folder, _Recorder(), ckpt_path=str(path))
    expected = whole[half:]
    equal = sum(torch.equal(a, b) for a, b in zip(again, expected, strict=False))
    wrong = max(len(again), len(expected)) - equal
    largest = max(float((resumed[name].double() - x.double()).abs().max()) for name, x in weights.items())
    on_cpu = subject.device.type == "cpu"
    if wrong:
        figure = f"{wrong} of {len(expected)} batches differ"
    elif largest == 0:
        figure = f"{len(expected)} batches and the weights are equal"
    else:
        why = "" if on_cpu else "; kernels of this device sum in any order"
        figure = f"{len(expected)} batches are equal, weights differ by up to {largest:.1e}{why}"
    return Found(
        passed=wrong == 0 and (largest == 0 or not on_cpu),
        figure=figure,
        values={"batches": len(expected), "wrong": wrong, "largest_difference_of_weights": largest},
    )


@check(
    "waits",
    target="none between logging steps",
    advice="host and device wait for each other at the lines named: report them",
)
def waits(subject: Subject, watch: Watch | None = None) -> Found:
    """Count how often the host waits for the device in training steps and while batches are served.

    Args:
        subject: what is checked.
        watch: how waits are found; None for `cuda_waits`, which finds them on CUDA only.
    """
    if watch is None and subject.device.type != "cuda":
        return Found(passed=None, figure=f"torch reports waits on CUDA, not on {subject.device.type}")
    found: list[str] = []
    for precision in PRECISIONS:
        watched = _Watched(watch or cuda_waits, WARM_UP, subject.sizes.steps)
        data = subject.data(normalize="mean_norm")
        with TemporaryDirectory() as folder:
            subject.trainer(folder, [watched], precision=precision).fit(subject.sae(data), data)
        found += watched.found
    steps, places = len(PRECISIONS) * (subject.sizes.steps - WARM_UP), sorted(set(found))
    return Found(
        passed=not found,
        figure=f"{len(found)} in {steps} steps" + (f": {', '.join(places)}" if places else ""),
        values={"waits": len(found), "steps": steps, "places": places},
    )


@contextmanager
def cuda_waits() -> Iterator[list[str]]:
    """List the lines at which the host waits for CUDA inside the context, in any thread."""
    found: list[str] = []
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        show = warnings.showwarning

        def note(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if WAIT in str(message):
                found.append(_innermost(filename, lineno))
            else:
                show(message, category, filename, lineno, file, line)

        warnings.filterwarnings("always", message=f".*{WAIT}")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(mode)


def _innermost(filename: str, lineno: int) -> str:
    """The innermost line of this package on the stack, without these checks; else the line of the warning."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if PACKAGE in path.parents and "cli" not in path.relative_to(PACKAGE).parts:
            return f"{path.relative_to(PACKAGE)}:{frame.lineno}"
    return f"{filename}:{lineno}"


class _Watched(Callback):
    """Lists waits from the end of step `first` to the end of step `last`."""

    def __init__(self, watch: Watch, first: int, last: int) -> None:
        self.found: list[str] = []
        self._watch, self._first, self._last = watch, first, last
        self._open = ExitStack()

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Begin or end."""
        if trainer.global_step == self._first:
            self.found = self._open.enter_context(self._watch())
        elif trainer.global_step == self._last:
            self._open.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """End."""
        self._open.close()


class _Recorder(Callback):
    """Stores copies of the batches, and saves a checkpoint after step `save_after`."""

    def __init__(self, save_after: int | None = None, path: Path = Path()) -> None:
        self.batches: list[Tensor] = []
        self._save_after, self._path = save_after, path

    def on_train_batch_start(
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: LightningModule,  # noqa: ARG002
        batch: Tensor,
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Copy the batch."""
        self.batches.append(batch.detach().cpu().clone())

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Save the checkpoint."""
        if trainer.global_step == self._save_after:
            trainer.save_checkpoint(self._path)


def _train(
    subject: Subject, folder: str, recorder: _Recorder, ckpt_path: str | None = None
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Train an SAE; returns its batches, and its weights and counters at the end."""
    data = subject.data()
    sae = subject.sae(data)
    subject.trainer(folder, [recorder]).fit(sae, data, ckpt_path=ckpt_path)
    return recorder.batches, {name: x.detach().cpu().clone() for name, x in sae.state_dict().items()}
