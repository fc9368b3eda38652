"""Help texts: short overviews that import no torch, and the options of a group in detail."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import is_dataclass
from importlib.metadata import version
from pathlib import Path

import pytest

from deeplens_lightning import options
from deeplens_lightning.cli.commands import FUNCTIONS
from deeplens_lightning.cli.help import GROUPS, OWN_COMMANDS, TRAINER_COMMANDS
from deeplens_lightning.cli.main import main


def shown(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    main(words)
    return capsys.readouterr().out


def test_help_lists_every_command_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(["--help"], capsys).splitlines()
    for name, text in {**TRAINER_COMMANDS, **OWN_COMMANDS}.items():
        assert [line for line in lines if line.split()[:1] == [name]] == [f"  {name:10}{text}"]
    assert set(OWN_COMMANDS) == set(FUNCTIONS)


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_help_of_a_trainer_command_is_one_page_of_groups(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown([command, "--config", "any.yaml", "--help"], capsys)
    lines = text.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 110
    for name in GROUPS:
        [line] = [line for line in lines if line.startswith(f"  --{name}.* ")]
        assert len(line.split()) > 3
    assert f"deeplens-lightning {command} --data.help deeplens_lightning.ActivationDataModule" in text
    order = [text.index(part) for part in ("Commands", "Options", "Groups of options", "List the options")]
    assert order == sorted(order)


def test_every_group_of_settings_has_a_line_in_the_help() -> None:
    settings = {
        f"{kind.__module__}.{name}"
        for name, kind in inspect.getmembers(options, inspect.isclass)
        if is_dataclass(kind)
    }
    assert settings <= {group.class_path for group in GROUPS.values()}


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("trainer", "--trainer.max_epochs"),
        ("model", "--model.expansion_factor"),
        ("data", "--data.buffer_size"),
        ("data.text_options", "--data.text_options.drop_first_n"),
        ("data.cache_options", "--data.cache_options.checksums"),
    ],
)
def test_a_group_lists_its_options_and_no_others(
    name: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(["fit", f"--{name}.help"], capsys)
    assert option in text
    assert all(line.startswith(f"  --{name}") for line in text.splitlines() if line.startswith("  --"))


def test_a_group_lists_the_options_of_another_class(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--data.help", "deeplens_lightning.ActivationDataModule"])
    assert exit_.value.code in (0, None)
    assert "--data.buffer_size" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [["--help"], ["--version"], ["fit", "--help"], ["fit", "--data.text_options.help"]],
    ids=" ".join,
)
def test_help_imports_no_torch(words: list[str]) -> None:
    code = f"import sys; from deeplens_lightning.cli.main import main; main({words}); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600, capture_output=True)


@pytest.mark.parametrize("command", sorted(OWN_COMMANDS))
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code in (0, None)
    assert OWN_COMMANDS[command].split()[0] in capsys.readouterr().out


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(["--version"], capsys) == f"deeplens-lightning {version('deeplens-lightning')}\n"


@pytest.mark.parametrize("command", ["fit", "predict", "extract", "bench"])
def test_the_options_of_the_data_are_listed_with_any_other_words(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["--data.help"], ["--data.help", "--data.layer=2"], ["--data.layer=2", "--data.help"]):
        main([command, *words])
        said = capsys.readouterr()
        assert "--data.buffer_size" in said.out
        assert "--data.buffer_options.dtype" in said.out
        assert said.err == ""


def test_a_group_without_a_default_class_asks_for_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--trainer.callbacks.help"])
    said = capsys.readouterr().err
    assert (
        said == "error: --trainer.callbacks.help needs the name of a class: --trainer.callbacks.help=CLASS\n"
    )


@pytest.mark.parametrize("source", ["the command line", "a config"])
def test_the_options_of_the_chosen_class_are_listed(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "grid.yaml").write_text("model: {class_path: deeplens_lightning.SparseAutoencoderGrid}\n")
    words = ["--config", str(tmp_path / "grid.yaml")]
    words = words if source == "a config" else ["--model", "SparseAutoencoderGrid"]
    with pytest.raises(SystemExit) as exit_:
        main(["fit", *words, "--model.help"])
    assert exit_.value.code in (0, None)
    shown = capsys.readouterr().out
    assert "sweep" in shown
    assert "expansion_factor" not in shown.replace("SparseAutoencoder", "")
