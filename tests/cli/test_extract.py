"""`extract` says how much it will write, and at a terminal it writes a large cache only if that was agreed to."""

from __future__ import annotations

import os
import pty
import re
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest

from deeplens_lightning import ActivationDataModule
from deeplens_lightning.cli.main import main
from deeplens_lightning.extraction import predict
from deeplens_lightning.shards import ShardStream

ROW = 64 * 4 + 32


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Standard input is a terminal."""
    keyboard, screen = pty.openpty()
    with os.fdopen(screen) as file:
        monkeypatch.setattr("sys.stdin", file)
        yield
    os.close(keyboard)


@pytest.fixture
def words(small: list[str], tmp_path: Path) -> list[str]:
    data = [word for word in small if word.startswith("--data") and "max_tokens" not in word]
    return ["extract", *data, f"--out={tmp_path / 'acts'}", "--accelerator=cpu"]


def rows(tmp_path: Path) -> int:
    return ShardStream(tmp_path / "acts", batch_size=1, split="all").rows


def test_the_size_is_printed_and_is_about_right(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(words)
    said = re.search(rf"acts: about ([\d,]+) rows of {ROW} bytes, 0\.\d+ GB", capsys.readouterr().out)
    assert said is not None
    assert int(said[1].replace(",", "")) == pytest.approx(rows(tmp_path), rel=0.1)


@pytest.mark.usefixtures("terminal")
def test_at_a_terminal_a_large_cache_needs_yes_or_max_rows(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "LARGE", 100 * ROW)
    with pytest.raises(
        SystemExit, match=r"acts would hold about [\d,]+ rows .*: add --yes .* or --max_rows 100 for"
    ):
        main(words)
    assert not (tmp_path / "acts").exists()
    main([*words, "--max_rows=100"])
    assert rows(tmp_path) == 100
    everything = [*words, f"--out={tmp_path / 'all' / 'acts'}", "--yes"]
    main(everything)
    assert rows(tmp_path / "all") > 100


def test_without_a_terminal_nothing_is_asked(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "LARGE", 100 * ROW)
    main(words)
    assert rows(tmp_path) > 100


@pytest.mark.usefixtures("terminal")
def test_a_dataset_of_unknown_length_is_a_large_one(tiny: object, tmp_path: Path) -> None:
    stream = datasets.Dataset.from_dict({"text": ["some text of a stream"] * 50}).to_iterable_dataset()
    data = ActivationDataModule(tiny("llama"), 1, "mlp_out", stream, seq_length=32)  # type: ignore[operator]
    with pytest.raises(
        ValueError, match=r"would hold all rows of a dataset of unknown length, \d+ bytes each: add"
    ):
        predict.run(data, str(tmp_path / "acts"), accelerator="cpu")
    predict.run(data, str(tmp_path / "acts"), accelerator="cpu", max_rows=64)
    assert rows(tmp_path) == 64
