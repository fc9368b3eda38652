"""Before the first step: what the validation set and the statistics keep in memory, and that they keep their bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from deeplens_lightning.datamodule import ActivationDataModule
from deeplens_lightning.normalization import Moments
from deeplens_lightning.options import BufferOptions
from deeplens_lightning.stream import measured_statistics
from deeplens_lightning.stream.live_activations import LiveActivations
from tests.stream.small_stream import small_stream
from tests.support.tensor_bytes import TensorBytes
from tests.support.texts import texts

Tiny = Callable[[str], str]
MODEL_BATCH = 450_000
"""More than the tensors of one model batch of 4 blocks of 32 tokens, with its temporary tensors, in bytes."""


def opened(model: str, **changes: Any) -> tuple[ActivationDataModule, LiveActivations]:
    data = small_stream(model, hook="mlp_post", dataset=texts(90, 900), **({"layer": 0} | changes))
    data.setup("fit")
    assert data.live is not None
    return data, data.live


def test_the_validation_set_is_allocated_once(tiny: Tiny) -> None:
    data, live = opened(tiny("gpt2"), val_fraction=0.5, val_rows=10**6)
    with TensorBytes() as counted:
        rows = live.heldout
    size = sum(x.nbytes for x in rows.rows.values()) + rows.provenance.nbytes
    assert size > 10 * MODEL_BATCH, "the set is too small for this test"
    tokens = 6 * 8 * len(rows)  # of the blocks that hold the rows
    assert counted.peak < size + tokens + MODEL_BATCH
    data.teardown("fit")


def test_the_validation_set_has_a_limit_in_bytes_that_the_warning_names(tiny: Tiny) -> None:
    data, live = opened(tiny("gpt2"), val_rows=1000, buffer_options=BufferOptions(val_bytes=100 * 4 * 128))
    with pytest.warns(UserWarning, match=r"buffer_options\.val_bytes=51,200: .* at most 100 rows\. Raise"):
        rows = live.heldout
    assert len(rows) == 100
    data.teardown("fit")


def sample(live: LiveActivations) -> list[dict[str, Tensor]]:
    found = measured_statistics._sample(live.model, live.text("train"), 4, measured_statistics.ROWS, False)
    return [{name: x.clone() for name, x in rows.items()} for rows in found]


@pytest.mark.parametrize(("normalize", "ratio"), [("zscore", None), ("none", 1.2), ("zscore", 1.2)])
def test_statistics_are_those_of_all_rows_bit_for_bit(
    tiny: Tiny, normalize: Any, ratio: float | None
) -> None:
    data, live = opened(
        tiny("gpt2"), layer=[0, 1], normalize=normalize, buffer_options=BufferOptions(max_norm_ratio=ratio)
    )
    found, rows = live.measure(), sample(live)
    limits: dict[str, float] = {}
    if ratio is not None:
        limits = {
            name: ratio * float(torch.cat([x[name].norm(dim=1) for x in rows]).median())
            for name in data.hook_names
        }
    assert found.max_norms == limits
    for name in data.hook_names:
        moments = Moments(128)
        for x in rows:
            fine = torch.stack(
                [x[each].norm(dim=1) <= limits.get(each, torch.inf) for each in data.hook_names]
            )
            moments.update(x[name][fine.all(0)])
        wanted = moments.scaling(normalize)
        assert torch.equal(found.scalings[name].shift, wanted.shift)
        assert torch.equal(found.scalings[name].scale, wanted.scale)
    data.teardown("fit")


@pytest.mark.parametrize(
    ("normalize", "ratio", "kept"), [("zscore", None, 0), ("none", 1.2, 4), ("zscore", 1.2, 4 * 128 + 4)]
)
def test_statistics_keep_only_what_they_need_of_a_row(
    tiny: Tiny, normalize: Any, ratio: float | None, kept: int
) -> None:
    data, live = opened(tiny("gpt2"), normalize=normalize, buffer_options=BufferOptions(max_norm_ratio=ratio))
    rows = sum(len(x) for batch in sample(live) for x in batch.values())
    assert rows * 4 * 128 > 10 * MODEL_BATCH, "the sample is too small for this test"
    with TensorBytes() as counted:
        live.measure()
    assert counted.peak < rows * (kept + 16) + MODEL_BATCH
    data.teardown("fit")
