"""Errors while serving: the first one is shown, everything is freed, and nothing goes on in silence."""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from deeplens_lightning.activation_data import NotSetUpError
from deeplens_lightning.shards import DiskFullError, verify
from tests.support.recorder import assert_same, take
from tests.support.training import data, sae, trainer


class Healing:
    """Fail once, in one forward pass of a frozen model."""

    def __init__(self, dm: Any, at: int) -> None:
        self.calls, self.at, self.run = 0, at, dm.model.activations
        dm.model.activations = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise ConnectionError("the model is away")
        return self.run(*args, **kwargs)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_after_an_error_the_same_batches_come_again(prefetch: int, tiny: Callable[[str], str]) -> None:
    dm = data(tiny("gpt2"), prefetch=prefetch)
    dm.setup("fit")
    expected = take(dm, 30)
    dm.teardown("fit")

    dm = data(tiny("gpt2"), prefetch=prefetch)
    dm.setup("fit")
    Healing(dm, at=6)
    found: list[Any] = []
    failed = 0
    while len(found) < 30:
        try:
            found += take(dm, 1)
        except ConnectionError:
            failed += 1
    assert failed == 1
    dm.teardown("fit")
    assert_same(found, expected)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond `size` bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Saving(L.Callback):
    """Take the data module's state after some batches, as a checkpoint does."""

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 7:
            trainer.datamodule.state_dict()


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("callbacks", [[Saving()], []], ids=["at a checkpoint", "at the end of the epoch"])
def test_a_full_disk_is_the_error_shown_and_everything_is_freed(
    callbacks: list[L.Callback], prefetch: int, tiny: Callable[[str], str], tmp_path: Path
) -> None:
    dm = data(tiny("gpt2"), write_shards=str(tmp_path / "cache"), prefetch=prefetch)
    run = trainer(tmp_path, callbacks=callbacks, max_epochs=2, limit_val_batches=0)
    with largest_file(2**13), pytest.raises(DiskFullError, match="no space for the next shard"):
        run.fit(sae(dm), dm)
    assert dm.serving.opened is None
    assert dm.serving.loader is None
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith(("activation-producer", "shard-writer"))]


def test_an_error_while_closing_does_not_hide_the_first_one(
    tiny: Callable[[str], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dm = data(tiny("gpt2"), write_shards=str(tmp_path / "cache"))
    run = trainer(tmp_path, max_steps=60, limit_val_batches=0)
    module = sae(dm)
    step = module.training_step

    def failing(batch: Any, batch_idx: int) -> Any:
        if batch_idx == 5:
            raise ArithmeticError("the user's own mistake")
        return step(batch, batch_idx)

    module.training_step = failing  # type: ignore[method-assign]
    with largest_file(2**13), pytest.raises(ArithmeticError, match="own mistake"):
        run.fit(module, dm)
    assert "DiskFullError" in caplog.text
    assert dm.serving.opened is None
    assert dm.serving.loader is None


@pytest.mark.parametrize("every", [1, 3])
def test_checkpoints_while_a_thread_writes_the_cache_lose_and_double_no_row(
    every: int, tiny: Callable[[str], str], tmp_path: Path
) -> None:
    plain = data(tiny("gpt2"))
    plain.setup("fit")
    expected = take(plain, 40)
    plain.teardown("fit")
    dm = data(tiny("gpt2"), write_shards=str(tmp_path / "cache"), prefetch=3)
    dm.setup("fit")
    found: list[Any] = []
    while len(found) < 40:
        found += take(dm, 1)
        if len(found) % every == 0:
            dm.state_dict()
    assert_same(found, expected)
    state = dm.state_dict()
    dm.on_exception(KeyboardInterrupt())

    again = data(tiny("gpt2"), write_shards=str(tmp_path / "cache"), prefetch=3)
    again.setup("fit")
    again.load_state_dict(state)
    list(again.train_dataloader())
    again.teardown("fit")
    report = verify(str(tmp_path / "cache"))
    assert report.problems == []
    whole = data(tiny("gpt2"), write_shards=str(tmp_path / "whole"))
    whole.setup("fit")
    list(whole.train_dataloader())
    whole.teardown("fit")
    assert verify(str(tmp_path / "whole")).rows == report.rows


def test_a_closed_data_module_has_no_length_and_says_what_to_do(tiny: Callable[[str], str]) -> None:
    dm = data(tiny("gpt2"))
    dm.setup("fit")
    loader = dm.val_dataloader()
    dm.teardown("fit")
    with pytest.raises(TypeError, match=r"setup\(\"fit\"\)"):
        len(loader)  # type: ignore[arg-type]
    with pytest.raises(NotSetUpError, match=r"setup\(\"fit\"\)"):
        _ = data(tiny("gpt2"), normalize="zscore").scaling
