"""The progress bar shows its figures whole on 80 columns, and no number of epochs where there is none."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import rich
from lightning.pytorch.callbacks import RichProgressBar

from deeplens_lightning.callbacks import FitSummary, Throughput
from deeplens_lightning.callbacks.progress import FitProgressBar
from tests.support.training import data, sae, trainer


@pytest.fixture
def terminal() -> Iterator[io.StringIO]:
    """What a terminal with 80 columns gets from a progress bar."""
    yield io.StringIO()
    rich.reconfigure()


def test_figures_have_a_line_of_their_own_on_80_columns(
    tiny: Any, tmp_path: Path, terminal: io.StringIO
) -> None:
    bar = RichProgressBar(
        leave=True,
        console_kwargs={"file": terminal, "width": 80, "force_terminal": True, "color_system": None},
    )
    dm = data(tiny("gpt2"))
    options: dict[str, Any] = {"max_steps": 12, "val_check_interval": 6, "check_val_every_n_epoch": None}
    run = trainer(
        tmp_path,
        None,
        [bar, Throughput(), FitSummary()],
        enable_progress_bar=True,
        log_every_n_steps=2,
        **options,
    )
    run.fit(sae(dm), dm)
    assert isinstance(run.progress_bar_callback, FitProgressBar)
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue()).replace("\r", "\n").splitlines()
    assert max(map(len, lines)) <= 80
    [*_, figures] = [line.split() for line in lines if "train/fvu" in line]
    names = [re.fullmatch(r"(\S+)=[\d.,e+-]+", figure) for figure in figures]
    assert [match[1] for match in names if match] == ["train/fvu", "train/l0", "tokens_per_second", "val/fvu"]
    assert any(re.match(r"Epoch 0 +\S+ 12/", line) for line in lines)
    assert not any("-2" in line for line in lines)
