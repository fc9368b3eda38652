"""No feature of Lightning's Trainer changes, loses or repeats a batch, or leaves a thread or hook behind."""

from __future__ import annotations

import gc
import os
import threading
import traceback
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import psutil
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from transformers import AutoModel

from deeplens_lightning.callbacks import StreamStatistics
from deeplens_lightning.callbacks.stream_statistics import effective_number
from deeplens_lightning.datamodule import ActivationDataModule
from tests.support.recorder import Recorder, assert_same, take
from tests.support.texts import texts
from tests.support.training import data, sae, trainer

SIZED = {"max_tokens": 12 * 16}


def stream(lm: Any, count: int, **changes: Any) -> list[Any]:
    """The batches that a data module serves without a Trainer."""
    dm = data(lm, **changes)
    dm.setup("fit")
    found = take(dm, count)
    dm.teardown("fit")
    return found


def fitted(dm: ActivationDataModule, folder: Path, **options: Any) -> Recorder:
    recorder = Recorder()
    callbacks = options.pop("callbacks", [])
    trainer(folder, recorder, callbacks, **options).fit(sae(dm), dm)
    return recorder


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 40},
        {"max_epochs": 3, "limit_train_batches": 5},
        {"max_epochs": 3, "reload_dataloaders_every_n_epochs": 1, "limit_train_batches": 4},
        {"max_epochs": 2, "num_sanity_val_steps": 2, "limit_train_batches": 4},
        {"max_epochs": 2, "val_check_interval": 3, "limit_train_batches": 6},
        {"max_steps": 20, "val_check_interval": 3, "check_val_every_n_epoch": None},
        {"max_steps": 5, "accumulate_grad_batches": 4},
        {"max_steps": 10, "limit_val_batches": 0},
        {"fast_dev_run": 3},
    ],
    ids=str,
)
def test_training_gets_the_batches_of_the_stream_unchanged(
    options: dict[str, Any], sized: bool, tiny: Any, tmp_path: Path
) -> None:
    changes = SIZED if sized else {}
    found = fitted(data(tiny("gpt2"), **changes), tmp_path, **options).batches
    assert_same(found, stream(tiny("gpt2"), len(found), **changes))
    assert len(found) >= 3


def test_epochs_of_unknown_length_lose_no_batch_when_lightning_reads_ahead(tiny: Any, tmp_path: Path) -> None:
    found = fitted(data(tiny("gpt2"), texts(15)), tmp_path, max_epochs=3).batches
    expected = stream(tiny("gpt2"), len(found), dataset=texts(15))
    assert_same(found, expected)
    rows = torch.cat([rows for _, rows in found])
    assert (torch.unique(rows, dim=0, return_counts=True)[1] == 3).all(), "a row is not served once an epoch"


def test_iterators_that_are_never_used_take_no_batch(tiny: Any) -> None:
    dm = data(tiny("gpt2"))
    dm.setup("fit")
    loader = dm.train_dataloader()
    iter(loader), iter(loader)
    assert loader.served == 0
    first = list(islice(loader, 5))
    iter(loader)
    rest = list(islice(loader, 5))
    dm.teardown("fit")
    expected = [batch for batch, _ in stream(tiny("gpt2"), 10)]
    assert all(torch.equal(a, b) for a, b in zip(first + rest, expected, strict=True))


def test_a_loader_has_a_length_only_with_max_tokens(tiny: Any) -> None:
    dm = data(tiny("gpt2"))
    dm.setup("fit")
    with pytest.raises(TypeError, match="give max_tokens"):
        len(dm.train_dataloader())
    dm.teardown("fit")
    dm = data(tiny("gpt2"), **SIZED)
    dm.setup("fit")
    assert len(dm.train_dataloader()) == 12 == sum(1 for _ in dm.train_dataloader())
    dm.teardown("fit")


def test_reading_the_estimated_steps_keeps_the_position_of_a_resume(tiny: Any, tmp_path: Path) -> None:
    class Planning(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.mean = torch.nn.Parameter(torch.zeros(1))

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return ((batch - self.mean) ** 2).mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            self.planned = self.trainer.estimated_stepping_batches
            return torch.optim.SGD(self.parameters(), 0.1)

    def run(ckpt_path: str | None) -> list[Any]:
        recorder = Recorder()
        keep = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=7, save_top_k=-1, filename="{step}")
        dm = data(tiny("gpt2"), **SIZED)
        fit, module = trainer(tmp_path, recorder, [keep], max_epochs=3), Planning()
        fit.fit(module, dm, ckpt_path=ckpt_path)
        assert module.planned == 36
        return recorder.batches

    whole = run(None)
    assert_same(run(str(tmp_path / "kept" / "step=14.ckpt")), whole[14:])


def test_overfitting_repeats_the_same_batches(tiny: Any, tmp_path: Path) -> None:
    found = fitted(data(tiny("gpt2"), **SIZED), tmp_path, max_epochs=3, overfit_batches=2).batches
    assert len(found) == 6
    assert_same(found, 3 * found[:2])


def test_after_a_tuner_training_starts_at_the_first_batch(tiny: Any, tmp_path: Path) -> None:
    dm = data(tiny("gpt2"), **SIZED)
    recorder = Recorder()
    fit = trainer(tmp_path, recorder, max_steps=4)
    model = sae(dm)
    Tuner(fit).scale_batch_size(
        model, datamodule=dm, mode="power", steps_per_trial=2, init_val=16, max_trials=2
    )
    assert dm.batch_size == 32
    recorder.batches.clear()
    fit.fit(model, dm)
    assert_same(recorder.batches, stream(tiny("gpt2"), 4, batch_size=32, **SIZED))
    recorder.batches.clear()
    tuned = data(tiny("gpt2"), **SIZED)
    fit = trainer(tmp_path, recorder, max_steps=4)
    Tuner(fit).lr_find(sae(tuned), datamodule=tuned, num_training=8, attr_name="lr", update_attr=False)
    recorder.batches.clear()
    fit.fit(sae(tuned), tuned)
    assert_same(recorder.batches, stream(tiny("gpt2"), 4, **SIZED))


def test_validate_and_predict_without_a_fit_give_the_same_rows_each_time(tiny: Any, tmp_path: Path) -> None:
    dm = data(tiny("gpt2"))
    model = sae(dm)
    run = trainer(tmp_path, limit_val_batches=1.0)
    first = run.validate(model, dm, verbose=False)
    assert run.validate(model, dm, verbose=False) == first
    rows = run.predict(PassOn(), dm)
    assert rows is not None
    assert sum(map(len, rows)) == 64
    again = trainer(tmp_path).predict(PassOn(), dm)
    assert all(torch.equal(a, b) for a, b in zip(rows, again or [], strict=True))


class PassOn(L.LightningModule):
    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return batch.clone()


def test_a_second_fit_starts_at_the_first_batch(tiny: Any, tmp_path: Path) -> None:
    dm = data(tiny("gpt2"), normalize="zscore")
    first = fitted(dm, tmp_path, max_steps=9)
    second = fitted(dm, tmp_path, max_steps=9)
    assert_same(second.batches, first.batches)


def test_validating_a_checkpoint_does_not_move_the_start_of_the_next_fit(tiny: Any, tmp_path: Path) -> None:
    dm = data(tiny("gpt2"))
    run = trainer(tmp_path, max_steps=9)
    run.fit(sae(dm), dm)
    run.save_checkpoint(tmp_path / "a.ckpt")
    other = data(tiny("gpt2"))
    trainer(tmp_path).validate(sae(other), other, ckpt_path=str(tmp_path / "a.ckpt"), verbose=False)
    assert_same(fitted(other, tmp_path, max_steps=5).batches, stream(tiny("gpt2"), 5))


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true", "64-true"])
def test_every_precision_trains_on_the_same_rows(precision: Any, tiny: Any, tmp_path: Path) -> None:
    found = fitted(data(tiny("gpt2")), tmp_path, max_steps=6, precision=precision).batches
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    expected = [(batch.to(dtype), rows) for batch, rows in stream(tiny("gpt2"), 6)]
    assert_same(found, expected)
    assert torch.get_default_dtype() == torch.float32


def test_a_data_module_can_be_printed_at_any_time(tiny: Any, tmp_path: Path) -> None:
    dm = data(tiny("gpt2"))
    assert str(dm)
    fitted(dm, tmp_path, max_steps=2)
    assert str(dm)


# ---- the producer thread


def producers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "activation-producer"]


class Failing(L.Callback):
    """Raises in one of the hooks at its third call."""

    def __init__(self, hook: str, error: BaseException) -> None:
        self.calls, self.error = 0, error
        setattr(self, hook, self.call)

    def call(self, *_: Any, **__: Any) -> None:
        self.calls += 1
        if self.calls == 3:
            assert producers(), "the producer thread has ended"
            raise self.error


@pytest.mark.parametrize("prefetch", [1, 4])
def test_the_producer_thread_ends_with_the_fit(prefetch: int, tiny: Any, tmp_path: Path) -> None:
    found = fitted(data(tiny("gpt2"), prefetch=prefetch), tmp_path, max_steps=30).batches
    assert not producers()
    assert_same(found, stream(tiny("gpt2"), 30))


@pytest.mark.parametrize(
    ("hook", "error", "raised"),
    [
        ("on_train_batch_start", RuntimeError("in the step"), RuntimeError),
        ("on_before_optimizer_step", RuntimeError("in the optimizer"), RuntimeError),
        ("on_validation_batch_start", RuntimeError("in validation"), RuntimeError),
        ("on_train_batch_end", KeyboardInterrupt(), SystemExit),
    ],
)
def test_the_producer_thread_ends_after_an_exception(
    hook: str, error: BaseException, raised: type[BaseException], tiny: Any, tmp_path: Path
) -> None:
    dm = data(tiny("gpt2"), prefetch=2)
    options = {"val_check_interval": 2, "check_val_every_n_epoch": None, "max_steps": 30}
    with pytest.raises(raised):
        fitted(dm, tmp_path, callbacks=[Failing(hook, error)], **options)
    assert not producers()
    assert dm.model is None, "model and buffer are not freed"


def test_an_error_in_the_model_is_raised_with_its_own_traceback(tiny: Any, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(tiny("gpt2"))
    calls = 0

    def breaks_at_last(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise RuntimeError("the model is out of order")

    handle = model.h[0].register_forward_hook(breaks_at_last)
    dm = data(model, tokenizer=tiny("gpt2"), prefetch=2)
    with pytest.raises(RuntimeError, match="out of order") as caught:
        fitted(dm, tmp_path, max_steps=200)
    assert "breaks_at_last" in "".join(traceback.format_tb(caught.value.__traceback__))
    assert not producers()
    handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_twenty_fits_leave_no_thread_hook_or_memory_behind(tiny: Any, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(tiny("gpt2"))
    process = psutil.Process(os.getpid())

    def once() -> tuple[int, int, int]:
        fitted(data(model, tokenizer=tiny("gpt2"), prefetch=2, buffer_size=16_000), tmp_path, max_steps=3)
        gc.collect()
        hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
        return threading.active_count(), hooks, process.memory_info().rss

    for _ in range(3):
        begin = once()
    for _ in range(20):
        end = once()
    assert end[:2] == begin[:2]
    assert end[2] - begin[2] < 40e6, "twenty buffers would be 160 MB"


def test_stream_statistics_have_the_values_of_the_stream(tiny: Any, tmp_path: Path) -> None:
    assert effective_number(torch.tensor([3, 3, 3])) == 1
    assert effective_number(torch.tensor([1, 2, 3, 4])) == 4
    dm = data(tiny("gpt2"))
    fit = trainer(tmp_path, None, [StreamStatistics()], max_steps=20, log_every_n_steps=5)
    fit.fit(sae(dm), dm)
    found = {name: float(value) for name, value in fit.callback_metrics.items() if name.startswith("stream/")}
    assert found["stream/rows"] == 20 * 16
    assert found["stream/rows_dropped"] == 0
    assert 1 < found["stream/documents_per_batch"] <= 16
    assert 0 < found["stream/wait_fraction"] <= 1
    assert 0 < found["stream/row_age"] < 2 * 96
    assert found["stream/documents"] > 1
    assert found["stream/tokens"] >= 20 * 16
