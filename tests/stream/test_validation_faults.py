"""An error while held-out rows are first computed ends the run with that error, at once and whatever its type."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from deeplens_lightning.stream import validation_set
from tests.support.training import data, sae, trainer

ERRORS = [ValueError, TypeError, NotImplementedError]


def chain(error: BaseException | None) -> list[str]:
    """The messages of an error and of those that it was raised from or after."""
    found = []
    while error is not None:
        found.append(str(error))
        error = error.__cause__ or error.__context__
    return found


@pytest.mark.parametrize("options", [{}, {"limit_val_batches": 0.5}], ids=str)
@pytest.mark.parametrize("command", ["fit", "validate"])
@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_in_the_first_held_out_rows_is_raised_at_once(
    kind: type[Exception],
    command: str,
    options: dict[str, Any],
    tiny: Callable[[str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def fails(*_: Any) -> NoReturn:
        calls.append(1)
        raise kind("the model is out of order")

    monkeypatch.setattr(validation_set, "run_model", fails)
    dm = data(tiny("gpt2"), max_tokens=160)
    run = trainer(tmp_path, max_steps=6, **options)
    with pytest.raises((kind, RuntimeError)) as caught:
        getattr(run, command)(sae(dm), datamodule=dm)
    assert "the model is out of order" in str(caught.value)
    assert chain(caught.value)[-1] == "the model is out of order"
    assert (calls, run.global_step) == ([1], 0)
    assert dm.model is None


def test_the_length_is_a_type_error_only_where_there_are_no_rows(tiny: Callable[[str], str]) -> None:
    dm = data(tiny("gpt2"))
    dm.setup("fit")
    loader = dm.val_dataloader()
    dm.on_exception(RuntimeError("elsewhere"))
    with pytest.raises(TypeError, match="the number of validation batches is not known"):
        len(loader)
