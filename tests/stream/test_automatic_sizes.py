"""What `auto` chooses is a function of the configuration, is kept by a resumed run, and a difference is said."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch

from deeplens_lightning.datamodule import ActivationDataModule
from deeplens_lightning.stream.automatic_sizes import buffer_rows, model_batch_blocks
from deeplens_lightning.stream.live_activations import LiveActivations
from tests.cli.parsing import parsed
from tests.support.recorder import assert_same, take
from tests.support.training import data, of_an_earlier_release

Tiny = Callable[[str], str]
SAID = "lightning.pytorch.utilities.rank_zero"


def opened(model: str, state: dict[str, Any] | None = None, **changes: Any) -> ActivationDataModule:
    found = data(model, **changes)
    found.setup("fit")
    if state is not None:
        found.load_state_dict(state)
    return found


def state_after(dm: ActivationDataModule, batches: int) -> dict[str, Any]:
    take(dm, batches)
    return deepcopy(dm.state_dict())


def live(dm: ActivationDataModule) -> LiveActivations:
    assert dm.live is not None
    return dm.live


def slots(dm: ActivationDataModule) -> int | None:
    return dm.train_dataloader().stream.buffer_rows


@pytest.mark.parametrize(
    ("row_bytes", "batch_size", "rows"),
    [(4 * 768, 4096, 64 * 4096), (4 * 14_336, 4096, 4 * 4096), (4 * 14_336, 100, 17_400), (10**9, 8, 32)],
)
def test_the_automatic_buffer_has_a_limit_in_rows_and_one_in_bytes(
    row_bytes: int, batch_size: int, rows: int
) -> None:
    assert buffer_rows("auto", row_bytes=row_bytes, batch_size=batch_size) == rows


def test_the_automatic_buffer_is_the_same_on_every_device(tiny: Tiny) -> None:
    dm = opened(tiny("gpt2"), buffer_size="auto")
    found = {slots(dm)}
    for device in ("cuda:0", "mps"):
        elsewhere = replace(live(dm).placement, batch_device=torch.device(device))
        dm.serving.opened = replace(live(dm), placement=elsewhere)
        stream = dm.serving.opened.stream(16, dm.serving.measured(), None)
        found.add(stream.buffer_rows)
    assert found == {262_144}
    dm.teardown("fit")


def test_a_checkpoint_of_an_earlier_release_keeps_its_buffer_and_says_so(
    tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    dm = opened(tiny("gpt2"), buffer_size=160)
    state = of_an_earlier_release(state_after(dm, 40))
    rest = take(dm, 10)
    dm.teardown("fit")
    with caplog.at_level("INFO", SAID):
        again = opened(tiny("gpt2"), state, buffer_size="auto")
        assert_same(take(again, 10), rest)
    assert "keeps the 160 rows of the checkpoint" in caplog.text
    again.teardown("fit")


def test_nothing_is_said_where_nothing_differs(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    sizes: dict[str, Any] = {"buffer_size": "auto", "inference_batch_size": "auto"}
    dm = opened(tiny("gpt2"), **sizes)
    state = state_after(dm, 3)
    dm.teardown("fit")
    with caplog.at_level("INFO", SAID):
        again = opened(tiny("gpt2"), state, **sizes)
        take(again, 1)
    assert "checkpoint" not in caplog.text
    again.teardown("fit")


def test_before_the_first_batch_another_batch_size_has_its_own_buffer(tiny: Tiny) -> None:
    dm = opened(tiny("gpt2"))
    assert slots(dm) == 96
    state = deepcopy(dm.state_dict())
    dm.teardown("fit")
    tuned = opened(tiny("gpt2"), state, batch_size=10)
    assert slots(tuned) == 90
    take(tuned, 12)
    tuned.teardown("fit")


def test_automatic_model_batches_have_2048_tokens_on_a_cpu_and_16384_elsewhere(tiny: Tiny) -> None:
    for device, seq_length, blocks in (
        ("cpu", 128, 16), ("cpu", 4096, 1), ("cuda:1", 128, 128), ("mps", 1000, 16), ("cuda", 32_768, 1),
    ):  # fmt: skip
        chosen = model_batch_blocks("auto", seq_length=seq_length, device=torch.device(device))
        assert chosen == blocks, f"{seq_length} tokens on {device}"
        assert model_batch_blocks(3, seq_length=seq_length, device=torch.device(device)) == 3
    dm = opened(tiny("gpt2"), inference_batch_size="auto")
    named = opened(tiny("gpt2"), inference_batch_size=64)
    assert dm.state_dict()["fingerprint"] == named.state_dict()["fingerprint"]
    assert dm.state_dict()["fingerprint"]["inference_batch_size"] == "64"
    assert_same(take(dm, 30), take(named, 30))
    dm.teardown("fit")
    named.teardown("fit")


def test_a_resumed_run_keeps_the_model_batches_that_auto_chose_on_another_device(
    tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    whole = opened(tiny("gpt2"), inference_batch_size=3, buffer_size=160)  # as a device of 96 tokens would
    state = state_after(whole, 40)
    rest = take(whole, 30)
    whole.teardown("fit")
    with caplog.at_level("INFO", SAID):
        again = opened(tiny("gpt2"), state, inference_batch_size="auto", buffer_size=160)
        assert_same(take(again, 10), rest[:10])
    assert 'inference_batch_size="auto" keeps the 3 blocks of the checkpoint' in caplog.text
    state = deepcopy(again.state_dict())
    assert state["fingerprint"]["inference_batch_size"] == "3"
    again.teardown("fit")
    third = opened(tiny("gpt2"), state, inference_batch_size="auto", buffer_size=160)
    assert_same(take(third, 20), rest[10:])
    third.teardown("fit")
    other = opened(tiny("gpt2"), inference_batch_size=4, buffer_size=160)
    with pytest.raises(ValueError, match="inference_batch_size: 3 in the checkpoint, 4 now"):
        other.load_state_dict(state)
    other.teardown("fit")


@pytest.mark.parametrize(("word", "value"), [("auto", "auto"), ("24", 24)])
def test_the_command_line_takes_a_number_or_auto(word: str, value: Any) -> None:
    settings = parsed("fit", f"--data.inference_batch_size={word}")
    assert settings["data"]["init_args"]["inference_batch_size"] == value
