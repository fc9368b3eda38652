"""What `doctor` checks, the form of a check's result, and small data modules, SAEs and Trainers for the checks.

In: a device, a model and sizes. Out: the objects that a check runs. A check is a function of a `Subject` with the
decorator `check`; it always returns a `Check`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import torch
from lightning.pytorch import Callback, Trainer

from deeplens_lightning.datamodule import ActivationDataModule
from deeplens_lightning.demo.docs import demo_documents
from deeplens_lightning.model.pretrained import load_config, max_positions
from deeplens_lightning.options import ModelOptions
from deeplens_lightning.sae import SparseAutoencoder

P = ParamSpec("P")


@dataclass(frozen=True, kw_only=True)
class Check:
    """The result of one check.

    Attributes:
        name: what was checked.
        passed: None if the check does not apply to this device or model.
        figure: what was found, for people.
        target: what is promised.
        advice: what to do if it fails.
        speed: whether it is a speed, which fails only under `--strict`.
        values: the numbers behind `figure`, for the JSON file.
        seconds: how long the check took.
    """

    name: str
    passed: bool | None
    figure: str
    target: str
    advice: str
    speed: bool = False
    values: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the body of a check found: the fields of `Check` that are not known before it runs."""

    passed: bool | None
    figure: str
    values: Mapping[str, Any] = field(default_factory=dict)


def check(
    name: str, *, target: str, advice: str, speed: bool = False
) -> Callable[[Callable[Concatenate[Subject, P], Found]], Callable[Concatenate[Subject, P], Check]]:
    """Decorate the body of a check, so that it returns a `Check`: a failed one with the message if it raises.

    Args:
        name: what is checked.
        target: what is promised.
        advice: what to do if it fails.
        speed: whether it is a speed.
    """

    def decorate(body: Callable[Concatenate[Subject, P], Found]) -> Callable[Concatenate[Subject, P], Check]:
        @functools.wraps(body)
        def run(subject: Subject, /, *args: P.args, **kwargs: P.kwargs) -> Check:
            begun = time.perf_counter()
            try:
                found = body(subject, *args, **kwargs)
            except Exception as error:  # noqa: BLE001  reported as a failure, and the other checks still run
                message = str(error).strip() or "no message"
                found = Found(passed=False, figure=f"{type(error).__name__}: {message}")
            return Check(
                name=name,
                passed=found.passed,
                figure=found.figure,
                target=target,
                advice=advice,
                speed=speed,
                values=found.values,
                seconds=round(time.perf_counter() - begun, 2),
            )

        return run

    return decorate


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much each check computes. The defaults take about a minute on two CPU cores.

    Attributes:
        documents: documents whose rows are compared with the model's own.
        seq_length: length of a block in tokens, if the model takes as many.
        batch: rows per batch of a training.
        steps: steps of a training.
        d_sae: latents of a trained SAE.
        buffer_bytes: size of the buffer whose memory is measured.
        pairs: measurements of the stream and of the bare model.
        model_batches: model batches in one of them, a multiple of 32.
        step_rows: rows per batch of the SAE step that is timed.
        step_latents: latents of its SAE.
        matmul: rows and columns of the matrices whose product is timed.
        rank_seconds: seconds after which a training on two ranks is taken to hang.
    """

    documents: int = 64
    seq_length: int = 128
    batch: int = 256
    steps: int = 24
    d_sae: int = 1024
    buffer_bytes: int = 128 * 2**20
    pairs: int = 3
    model_batches: int = 32
    step_rows: int = 2048
    step_latents: int = 8192
    matmul: int = 2048
    rank_seconds: float = 180.0


ACCELERATOR = Sizes(step_rows=8192, step_latents=65_536, matmul=8192, buffer_bytes=256 * 2**20)
"""Sizes for CUDA and MPS, where the smaller ones measure the launching of kernels."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The device and the model that are checked.

    Attributes:
        device: the device; a CUDA device has an index.
        hf_model: hub id, folder, `.gguf` file or `demo:lm`.
        layer: layer of the hook point; None for the data module's default.
        hook: the hook point; None for the data module's default.
        sizes: how much each check computes.
    """

    device: torch.device
    hf_model: str = "demo:lm"
    layer: int | None = None
    hook: str | None = None
    sizes: Sizes = Sizes()

    @functools.cached_property
    def seq_length(self) -> int:
        """Length of a block in tokens."""
        return min(self.sizes.seq_length, max_positions(load_config(self.hf_model)) or self.sizes.seq_length)

    def documents(self, count: int) -> list[str]:
        """`count` documents, spread over `demo:docs`."""
        documents = demo_documents()
        return list(documents[:: max(1, len(documents) // count)][:count])

    def data(self, dtype: torch.dtype | None = None, **changes: Any) -> ActivationDataModule:
        """A data module on `demo:docs` with small batches, a buffer of eight of them and no held-out documents.

        Args:
            dtype: dtype of the model; None for the model's own.
            changes: settings that differ.
        """
        settings = {
            "layer": self.layer,
            "hook": self.hook,
            "seq_length": self.seq_length,
            "batch_size": self.sizes.batch,
            "buffer_size": 8 * self.sizes.batch,
            "val_fraction": 0.0,
            "device": str(self.device),
            "model_options": ModelOptions(kwargs={"dtype": dtype} if dtype is not None else None),
        }
        return ActivationDataModule(self.hf_model, **(settings | changes))

    def sae(self, data: ActivationDataModule) -> SparseAutoencoder:
        """A TopK SAE with the same initial weights every time, whose latents soon count as dead (for AuxK)."""
        return SparseAutoencoder(data.d_in, self.sizes.d_sae, k=16, dead_after_tokens=4 * self.sizes.batch)

    def trainer(self, folder: str | Path, callbacks: Sequence[Callback] = (), **changes: Any) -> Trainer:
        """A Trainer on the device, without output, checkpoints or logging steps, that takes `sizes.steps` steps.

        Args:
            folder: where Lightning may write.
            callbacks: callbacks of the training.
            changes: settings that differ.
        """
        kind, index = self.device.type, self.device.index
        settings: dict[str, Any] = {
            "accelerator": kind,
            "devices": 1 if kind == "cpu" or index is None else [index],
            "max_steps": self.sizes.steps,
            "max_epochs": -1,
            "limit_val_batches": 0,
            "log_every_n_steps": self.sizes.steps + 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": folder,
        }
        return Trainer(callbacks=list(callbacks), **(settings | changes))
