"""Callbacks that run a model which the producer thread runs too: neither sees the other's hooks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from deeplens_lightning.callbacks import ExtractSingleSample, LossRecovered
from tests.callbacks.conftest import Run

TEXT = "The capital of France is Paris."
FILES = ("loss_recovered.jsonl", "single_samples/samples.jsonl", "own/samples.jsonl")


@contextmanager
def slowly(model: PreTrainedModel) -> Iterator[None]:
    """Let other threads run in the middle of each layer, so that two forward passes at a time always meet."""
    handles = [
        module.register_forward_pre_hook(lambda *_: time.sleep(0.0005))
        for name, module in model.named_modules()
        if name.endswith(("attn", "mlp"))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _callbacks(model: PreTrainedModel) -> list[L.Callback]:
    return [
        LossRecovered(40),
        ExtractSingleSample(texts=[TEXT], every_n_steps=2),
        ExtractSingleSample(model, texts=[TEXT], every_n_steps=1, name="own"),
    ]


def _lines(folder: Path) -> list[Any]:
    return [json.loads(line) for name in FILES for line in (folder / name).read_text().splitlines()]


def test_training_and_callbacks_that_share_a_model_with_a_thread_are_bit_identical(
    fit: Callable[..., Run],
    live: Callable[..., Any],
    undisturbed: Callable[[Run, Run], None],
    lm_folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Drawing would take most of the time of this test.
    nothing = np.zeros((1, 1, 4), dtype=np.uint8)
    monkeypatch.setattr("deeplens_lightning.callbacks.single_sample.sample_picture", lambda *_: nothing)
    model = AutoModelForCausalLM.from_pretrained(lm_folder).train()
    options: dict[str, Any] = {
        "max_epochs": 1,
        "val_check_interval": 3,
        "check_val_every_n_epoch": None,
        "limit_val_batches": 1,
    }
    with slowly(model):
        alone = fit([], datamodule=live(hf_model=model), **options)
        in_turn = fit(_callbacks(model), datamodule=live(hf_model=model), **options)
        expected = _lines(tmp_path / "run")
        for name in FILES:
            (tmp_path / "run" / name).unlink()
        beside = fit(_callbacks(model), datamodule=live(hf_model=model, prefetch=20), **options)
    undisturbed(alone, in_turn)
    undisturbed(alone, beside)
    assert _lines(tmp_path / "run") == expected
    assert model.training
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_single_samples_without_a_trainer_do_not_meet_the_thread(
    live: Callable[..., Any], lm_folder: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(lm_folder)

    def served(prefetch: int, meanwhile: Callable[[], Any]) -> list[torch.Tensor]:
        data = live(hf_model=model, prefetch=prefetch)
        data.setup("fit")
        batches = []
        for batch in islice(data.train_dataloader(), 8):
            meanwhile()
            batches.append(batch.clone())
        data.teardown("fit")
        return batches

    expected = ExtractSingleSample(model, layer=2, tokenizer=lm_folder).get_mlp_acts(TEXT)
    read: list[torch.Tensor] = []

    def read_again() -> None:  # a new reader each time: loading runs the model too
        read.append(ExtractSingleSample(model, layer=2, tokenizer=lm_folder).get_mlp_acts(TEXT))

    with slowly(model):
        alone = served(0, lambda: None)
        beside = served(20, read_again)
    assert all(torch.equal(a, b) for a, b in zip(alone, beside, strict=True))
    assert len(read) == 8
    assert all(torch.equal(rows, expected) for rows in read)
