"""Run all checks on a device and a model, print them as a table, and write them as JSON.

In: a device and a model. Out: the exit code, 1 if something that must hold does not. Correctness, waits and memory
pass or fail; a speed below its target fails only with `strict`.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers.utils import logging as transformers_logging

from deeplens_lightning.cli.doctor.fidelity import fidelity, fidelity_own_dtype
from deeplens_lightning.cli.doctor.kernels import kernels_bfloat16, kernels_float32
from deeplens_lightning.cli.doctor.memory import memory
from deeplens_lightning.cli.doctor.ranks import two_ranks
from deeplens_lightning.cli.doctor.speed import step_speed, stream_speed
from deeplens_lightning.cli.doctor.subject import ACCELERATOR, Check, Sizes, Subject
from deeplens_lightning.cli.doctor.training import resume, waits
from deeplens_lightning.devices import device_of
from deeplens_lightning.disk.files import write_whole

CHECKS: tuple[Callable[[Subject], Check], ...] = (
    fidelity,
    fidelity_own_dtype,
    resume,
    kernels_float32,
    kernels_bfloat16,
    two_ranks,
    waits,
    memory,
    stream_speed,
    step_speed,
)

PACKAGES = (
    "deeplens-lightning",
    "torch",
    "transformers",
    "lightning",
    "datasets",
    "torchdata",
    "numpy",
    "triton",
)
"""Packages whose versions are in the JSON file."""


def doctor(
    device: str = "auto",
    hf_model: str = "demo:lm",
    layer: int | None = None,
    hook: str | None = None,
    out: str | None = None,
    strict: bool = False,
) -> None:
    """Check rows, resuming, kernels, ranks, waits, memory and speed on this machine; exit with 1 if one fails.

    Args:
        device: `cpu`, `cuda`, `cuda:1`, `mps`, or `auto` for the first of CUDA, MPS and the CPU that is there.
        hf_model: hub id, folder, GGUF file, or `demo:lm`.
        layer: layer of the hook point; default the data module's.
        hook: a kind of hook point (`mlp_in`, `mlp_act`, `mlp_post`, `mlp_out`, `attn_out`, `attn_z`, `resid_pre`,
            `resid_mid`, `resid_post`, `final_norm`), a canonical name (`layers.3.mlp_out`), a TransformerLens name
            (`blocks.3.hook_mlp_out`) or a module path (`transformer.h.3.mlp`); default the data module's.
        out: JSON file to write the figures to.
        strict: speeds below their targets fail too.

    Raises:
        SystemExit: with 1, a check failed.
        ValueError: there is no such device, or the model has no such hook point.
        FileNotFoundError: there is no such model, or no folder for `out`.
    """
    chosen = device_of(device)
    if out is not None and not Path(out).absolute().parent.is_dir():
        raise FileNotFoundError(
            f"out={out!r}: there is no folder {str(Path(out).absolute().parent)!r}; make it first"
        )
    sizes = Sizes() if chosen.type == "cpu" else ACCELERATOR
    subject = Subject(device=chosen, hf_model=hf_model, layer=layer, hook=hook, sizes=sizes)
    subject.data().prepare_data()
    if not run_checks(subject, CHECKS, out, strict):
        sys.exit(1)


def run_checks(
    subject: Subject,
    checks: Sequence[Callable[[Subject], Check]],
    out: str | None = None,
    strict: bool = False,
) -> bool:
    """Run checks, print a table, and write the JSON file.

    Args:
        subject: the device and the model.
        checks: the checks to run.
        out: JSON file to write the figures to; None for none.
        strict: a speed below its target is a failure too.

    Returns:
        Whether everything that must hold does.
    """
    results = []
    with _only_warnings(), Console(stderr=True).status("checking") as status:
        for check in checks:
            status.update((check.__doc__ or "checking").partition("\n")[0])
            results.append(check(subject))
    machine = _machine(subject.device)
    passed = not any(failed(result, strict) for result in results)
    Console().print(_table(results, strict, f"{subject.hf_model} on {machine['device']}"))
    if out is not None:
        report = {"passed": passed, "strict": strict, "model": subject.hf_model, "machine": machine}
        report["checks"] = [asdict(result) for result in results]
        write_whole(Path(out), json.dumps(report, indent=2).encode())
    return passed


def failed(result: Check, strict: bool) -> bool:
    """Whether a check counts as a failure; `strict` counts speeds too."""
    return result.passed is False and (strict or not result.speed)


def _table(results: Sequence[Check], strict: bool, title: str) -> Table:
    table = Table(title=title, show_lines=True)
    for column in ("check", "result", "figure", "target", "what to do"):
        table.add_column(column, overflow="fold", no_wrap=column == "result")
    for result in results:
        word = "passed" if result.passed else "below the target"
        if result.passed is None:
            word = "not applicable"
        elif failed(result, strict):
            word = "[bold red]FAILED[/]"
        advice = "" if result.passed is not False else result.advice
        table.add_row(result.name, word, *map(escape, (result.figure, result.target, advice)))
    return table


def _machine(device: torch.device) -> dict[str, Any]:
    """The device's name, the number of cores, and the versions of what runs on it."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"{device.type} ({_processor()})",
        "type": device.type,
        "devices": torch.cuda.device_count() if cuda else 1,
        "cuda": torch.version.cuda,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _processor() -> str:
    """The name of the processor."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@contextmanager
def _only_warnings() -> Iterator[None]:
    """Leave out what is logged about each of the short trainings; warnings and errors are shown."""
    loggers = [logging.getLogger(f"lightning.pytorch{name}") for name in ("", ".utilities.rank_zero")]
    levels = [logger.level for logger in loggers]
    bars = transformers_logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
