"""How close a stream is to the bare model: the same blocks through both, in turn, in one process.

In: a data module. Out: tokens per second of both and the median of their ratios, pair by pair. The bare model is
the one that transformers makes, as it is; a ratio above 1 is the stream's own faster kernels (`kernels.py`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm

from deeplens_lightning.datamodule import ActivationDataModule
from deeplens_lightning.model.frozen import FrozenModel

Inputs = Mapping[str, Tensor]
PAUSE = 0.5
"""Seconds for what runs ahead of the stream to come to rest, so that it does not run beside the bare model."""


class _Stop(BaseException):
    """Raised at the deepest hook point."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Tokens per second, a value a pair.

    Attributes:
        bare: the truncated model stopped at the deepest hook point, nothing kept.
        stream: the loader's batches, which ran the same model batches.
    """

    bare: list[float]
    stream: list[float]

    @property
    def ratios(self) -> list[float]:
        """Stream over bare, pair by pair."""
        return [stream / bare for stream, bare in zip(self.stream, self.bare, strict=True)]


def compare(data: ActivationDataModule, pairs: int, model_batches: int) -> Comparison:
    """Serve batches until so many model batches ran, then run those bare; `pairs` times.

    Args:
        data: a streaming data module without a Trainer.
        pairs: how often.
        model_batches: model batches a measurement. Text is tokenised for 32 of them at a time, so give as many or
            several times as many.
    """
    data.setup("fit")
    model = data.model
    assert model is not None
    ran: list[Inputs] = []
    watched = _Watched(model, ran)
    data.source.model = watched  # type: ignore[assignment]
    batches = iter(data.train_dataloader())
    next(batches)
    stream, bare = [], []
    for _ in tqdm(range(pairs), desc="pairs", unit="pair"):
        ran.clear()
        begun = _now(model)
        while len(ran) < model_batches:
            next(batches)
        streamed = _now(model) - begun
        inputs = list(ran)
        time.sleep(PAUSE)
        begun = _now(model)
        for batch in inputs:
            _run_bare(model, batch)
        tokens = sum(batch["tokens"].numel() for batch in inputs)
        bare.append(tokens / (_now(model) - begun))
        stream.append(tokens / streamed)
    data.teardown("fit")
    return Comparison(bare=bare, stream=stream)


def bench(
    data: ActivationDataModule, pairs: int = 10, model_batches: int = 64, out: str | None = None
) -> Comparison:
    """Print the comparison as a table, and write it as JSON where `out` says."""
    result = compare(data, pairs, model_batches)
    table = Table(title=f"{', '.join(data.hook_names)}: positions per second, {pairs} pairs")
    for column in ("", "median", "min", "max"):
        table.add_column(column, justify="right" if column else "left")
    for name, values, form in (
        ("bare model", result.bare, "{:,.0f}"),
        ("stream", result.stream, "{:,.0f}"),
        ("stream / bare", result.ratios, "{:.3f}"),
    ):
        table.add_row(name, *(form.format(x) for x in (median(values), min(values), max(values))))
    Console().print(table)
    if out is not None:
        threads = {"threads": torch.get_num_threads(), "torch": torch.__version__}
        Path(out).write_text(
            json.dumps(asdict(result) | {"ratio": median(result.ratios)} | threads, indent=2)
        )
    return result


class _Watched:
    """A frozen model that notes what it was asked to run."""

    def __init__(self, model: FrozenModel, ran: list[Inputs]) -> None:
        self._model, self._ran = model, ran

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def activations(self, **inputs: Tensor) -> dict[str, Tensor]:
        self._ran.append(inputs)
        return self._model.activations(**inputs)


def _run_bare(model: FrozenModel, inputs: Inputs) -> None:
    """The model's own forward pass, left when the last of the hook points is reached."""
    base = model.base
    given = {"input_ids" if name == "tokens" else name: x.to(model.device) for name, x in inputs.items()}
    missing = {point.name for point in model.hook_points}

    with ExitStack() as stack:
        for point in model.hook_points:

            def reached(*_: Any, name: str = point.name) -> None:
                missing.discard(name)
                if not missing:
                    raise _Stop

            module = base.get_submodule(point.module)
            into = module.register_forward_pre_hook if point.side == "in" else module.register_forward_hook
            stack.callback(into(reached).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(suppress(_Stop))
        base(**given, use_cache=False)


def _now(model: FrozenModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
