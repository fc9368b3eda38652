"""Compare the rows of a data module with those of the untouched model, which runs on each segment alone.

In: a `Subject`. Out: a `Check` in float32, and one in the model's own dtype.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from deeplens_lightning.cli.doctor.subject import Found, Subject, check
from deeplens_lightning.model.hook_points import HookPoint
from deeplens_lightning.model.isolation import relative_error
from deeplens_lightning.model.pretrained import load_base, load_config
from deeplens_lightning.model.tracing import first_input, first_output
from deeplens_lightning.text.packing import Packing

FIDELITY = 1e-5
"""Largest relative error of a float32 row."""

ROUNDING = 2.0
"""Largest relative error of a row in lower precision, as a multiple of the untouched model's own."""


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Rows, and where each comes from.

    Attributes:
        rows: float32 `(n, d_in)` on the CPU.
        places: number of the document and position in it, of each row.
    """

    rows: Tensor
    places: list[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class _Streamed:
    """The rows of one pass over the documents, and what is needed to compute them again, alone.

    Attributes:
        served: the rows, in the order in which they were served.
        point: the hook point.
        packing: how documents were cut into segments.
        tokenizer: the model's tokenizer.
        dtype: dtype of the activations.
    """

    served: _Rows
    point: HookPoint
    packing: Packing
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype


@check(
    "packed rows, float32",
    target=f"worst row below {FIDELITY:.0e}, each token once",
    advice="give --data.model_options.isolation=padded in your runs, and report the model and the versions",
)
def fidelity(subject: Subject) -> Found:
    """Compare every row of a pass over some documents with the untouched model on each segment alone."""
    texts = subject.documents(subject.sizes.documents)
    streamed = _stream(subject, texts, torch.float32)
    alone = _alone(subject, texts, streamed, torch.float32)
    if (wrong := _miscounted(streamed.served, alone)) is not None:
        return Found(passed=False, figure=wrong)
    error, count = _worst(streamed.served, alone), len(alone.places)
    figure = f"worst of {count:,} rows {error:.1e}"
    return Found(passed=error < FIDELITY, figure=figure, values={"error": error, "rows": count})


@check(
    "packed rows, the model's own dtype",
    target=f"worst row at most {ROUNDING:g} x that of the untouched model in this dtype",
    advice="load the model with --data.model_options.kwargs.dtype=float32, and report the model and the versions",
)
def fidelity_own_dtype(subject: Subject) -> Found:
    """Compare rows in the model's own dtype with the untouched float32 model, beside the untouched model's own."""
    texts = subject.documents(subject.sizes.documents)
    streamed = _stream(subject, texts, None)
    name = str(streamed.dtype).removeprefix("torch.")
    if streamed.dtype.itemsize >= torch.float32.itemsize:
        return Found(passed=None, figure=f"the model is in {name}")
    exact = _alone(subject, texts, streamed, torch.float32)
    if (wrong := _miscounted(streamed.served, exact)) is not None:
        return Found(passed=False, figure=wrong)
    error = _worst(streamed.served, exact)
    untouched = _worst(_alone(subject, texts, streamed, streamed.dtype), exact)
    return Found(
        passed=error <= ROUNDING * untouched,
        figure=f"{name}: worst row {error:.1e}, untouched {untouched:.1e}",
        values={"error": error, "untouched": untouched, "dtype": name},
    )


def _stream(subject: Subject, texts: list[str], dtype: torch.dtype | None) -> _Streamed:
    """Serve every row of the documents once; `dtype` is the model's, None for its own."""
    data = subject.data(dtype, dataset_name=texts)
    data.setup("fit")
    rows: list[Tensor] = []
    places: list[tuple[int, int]] = []
    for batch in data.train_dataloader():
        where = data.provenance(batch)
        if where is None or not isinstance(batch, Tensor):
            raise ValueError("a batch has no provenance, or more than one hook point")
        rows.append(batch.float().cpu())
        places += zip(where.document_index.tolist(), where.position.tolist(), strict=True)
    model, packing, tokenizer = data.model, data.packing, data.tokenizer
    if model is None or packing is None or tokenizer is None:
        raise ValueError(f"{subject.hf_model} has no tokenizer: give a model that has one")
    (point,) = model.hook_points
    streamed = _Streamed(
        served=_Rows(rows=torch.cat(rows), places=places),
        point=point,
        packing=packing,
        tokenizer=tokenizer,
        dtype=model.dtypes[point.name],
    )
    data.teardown("fit")
    return streamed


@torch.no_grad()
def _alone(subject: Subject, texts: list[str], streamed: _Streamed, dtype: torch.dtype) -> _Rows:
    """Rows from a hook on the whole model, which runs one segment at a time, as transformers would run it."""
    point, packing, tokenizer = streamed.point, streamed.packing, streamed.tokenizer
    every_layer = [replace(point, layer=None)]
    base = load_base(
        subject.hf_model, load_config(subject.hf_model), every_layer, subject.device, {"dtype": dtype}
    )
    seen: list[Tensor | None] = []
    module = base.get_submodule(point.module)
    if point.side == "in":
        module.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(first_input(args, kwargs)), with_kwargs=True
        )
    else:
        module.register_forward_hook(lambda _, __, output: seen.append(first_output(output)))
    rows: list[Tensor] = []
    places: list[tuple[int, int]] = []
    for number, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text.strip() else []
        for begin in range(0, len(ids), packing.segment_tokens):
            part = ids[begin : begin + packing.segment_tokens]
            seen.clear()
            base(input_ids=torch.tensor([[*packing.prefix, *part, *packing.suffix]], device=base.device))
            (hidden,) = seen
            if hidden is None:
                raise TypeError(f"the module {point.module!r} received or returned no tensor")
            kept = [i for i, token in enumerate(part) if token not in packing.excluded]
            hidden = (hidden * point.scale).reshape(-1, point.d_in).float().cpu()
            rows.append(hidden[[len(packing.prefix) + i for i in kept]])
            places += [(number, begin + i) for i in kept]
    return _Rows(rows=torch.cat(rows), places=places)


def _miscounted(served: _Rows, alone: _Rows) -> str | None:
    """What is wrong with the numbers of rows; None if every token was served once and no other."""
    lost = len(set(alone.places) - set(served.places))
    again = len(served.places) - len(set(served.places))
    if lost or again or len(served.places) != len(alone.places):
        return f"{lost} of {len(alone.places):,} tokens were not served, {again} rows were served again"
    return None


def _worst(found: _Rows, reference: _Rows) -> float:
    """The largest relative error of a row; both hold the same rows in any order."""
    number = {place: i for i, place in enumerate(reference.places)}
    rows = reference.rows[[number[place] for place in found.places]]
    return float(relative_error(found.rows, rows).max())
