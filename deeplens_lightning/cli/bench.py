"""Measure the speed of a stream and of the bare model: the same model batches in both, in turns, in one process.

In: a data module. Out: tokens per second of both, and the median of their ratios, pair by pair. The bare model is
the unchanged model of transformers. A ratio above 1 comes from the faster CPU kernels (`model/cpu_kernels.py`) that
the stream uses.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm.auto import tqdm

from deeplens_lightning.datamodule import ActivationDataModule
from deeplens_lightning.disk.files import write_whole
from deeplens_lightning.model.frozen import FrozenModel

Inputs = Mapping[str, Tensor]
"""Arguments of the model's forward pass for one model batch: `input_ids`, and `position_ids` or `attention_mask`."""

PAUSE = 0.5
"""Seconds between a stream and the bare model: the prefetch thread fills its queue and then waits."""


class _Stop(BaseException):
    """Raised at the deepest hook point to end the forward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Tokens per second of the stream and of the bare model, one value per pair.

    Attributes:
        bare: rates of the bare model, which stops at the deepest hook point and discards the activations.
        stream: rates of the training loader, over the same model batches.
    """

    bare: list[float]
    stream: list[float]

    @property
    def ratios(self) -> list[float]:
        """Stream over bare, pair by pair."""
        return [stream / bare for stream, bare in zip(self.stream, self.bare, strict=True)]


def compare(data: ActivationDataModule, pairs: int, model_batches: int) -> Comparison:
    """Serve batches until `model_batches` model batches ran, then run these on the bare model; `pairs` times.

    Args:
        data: a data module that computes activations, without a Trainer.
        pairs: number of measurements of each.
        model_batches: number of model batches in a measurement. Text is tokenised for 32 of them at a time: give a
            multiple of 32.

    Raises:
        ValueError: the data module reads shards, so that there is no model to compare with.
    """
    data.setup("fit")
    model = data.model
    if model is None:
        raise ValueError(
            "bench compares the stream with a model: remove shards= and name the model with hf_model="
        )
    stream, bare = [], []
    with _recorded(model) as ran:
        batches = iter(data.train_dataloader())
        next(batches)
        for _ in tqdm(range(pairs), desc="pairs", unit="pair"):
            ran.clear()
            begun = _now(model)
            while len(ran) < model_batches:
                next(batches)
            streamed = _now(model) - begun
            inputs = [{name: x.cpu() for name, x in batch.items()} for batch in list(ran)]
            time.sleep(PAUSE)
            begun = _now(model)
            for batch in inputs:
                _run_bare(model, batch)
            tokens = sum(batch["input_ids"].numel() for batch in inputs)
            bare.append(tokens / (_now(model) - begun))
            stream.append(tokens / streamed)
    data.teardown("fit")
    return Comparison(bare=bare, stream=stream)


def bench(
    data: ActivationDataModule, pairs: int = 10, model_batches: int = 64, out: str | None = None
) -> None:
    """Measure the speed of the stream and of the bare model stopped at the hook point, in turns; print a table.

    Args:
        data: the data module, which computes activations, without a Trainer.
        pairs: number of measurements of each.
        model_batches: number of model batches in a measurement, a multiple of 32.
        out: JSON file to write the figures to; default none.
    """
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
        figures = asdict(result) | {"ratio": median(result.ratios)} | threads
        write_whole(Path(out), json.dumps(figures, indent=2).encode())


@contextmanager
def _recorded(model: FrozenModel) -> Iterator[list[Inputs]]:
    """A list to which the inputs of every forward pass of the model are appended."""
    ran: list[Inputs] = []

    def record(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ran.append({name: x for name, x in kwargs.items() if isinstance(x, Tensor)})

    handle = model.base.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield ran
    finally:
        handle.remove()


def _run_bare(model: FrozenModel, inputs: Inputs) -> None:
    """Run the model's own forward pass; end it when the last of the hook points is reached."""
    base = model.base
    given = {name: x.to(model.device) for name, x in inputs.items()}
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
