"""Errors of the command-line parser: one sentence, with the nearest option for an unknown one."""

from __future__ import annotations

from pathlib import Path

import pytest

from deeplens_lightning.cli.main import main

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")


def error(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("data.buffer_sise", "data.buffer_size"),
        ("trainer.max_epoch", "trainer.max_epochs"),
        ("model.expansion_factr", "model.expansion_factor"),
        ("daat.layer", "data.layer"),
        ("chkpt_path", "ckpt_path"),
    ],
)
def test_an_unknown_option_names_the_nearest_one(
    wrong: str, right: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = error(["fit", "--config", QUICKSTART, f"--{wrong}=3"], capsys)
    assert said == f"error: there is no option '{wrong}'; did you mean '{right}'?\n"


@pytest.mark.parametrize(
    ("yaml", "wrong", "right"),
    [
        ("data: {init_args: {max_tokns: 3}}", "data.max_tokns", "data.max_tokens"),
        ("trainer: {max_stepz: 3}", "trainer.max_stepz", "trainer.max_steps"),
    ],
)
def test_an_unknown_key_of_a_config_names_the_nearest_one(
    yaml: str, wrong: str, right: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml)
    said = error(["fit", "--config", QUICKSTART, "--config", str(path)], capsys)
    assert said == f"error: there is no option '{wrong}'; did you mean '{right}'?\n"


def test_the_commands_of_the_package_name_the_nearest_option_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'data.layer'?" in error(["extract", "--out=acts", "--data.layr=3"], capsys)
    assert "did you mean 'pairs'?" in error(["bench", "--pair=3"], capsys)
    assert "'xyz'; --help lists the options" in error(["verify", "acts", "--xyz=3"], capsys)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("data.layer=abc", "data.layer: got abc, expected int or list"),
        ("trainer.max_epochs=many", "trainer.max_epochs: got many, expected int"),
        ("data.normalize=unit", "data.normalize: got unit, expected one of ['none', "),
        ("model=Nothing", "model: got Nothing, expected the import path of a class"),
        ("config=/no/such.yaml", "File does not exist: '/no/such.yaml'"),
    ],
)
def test_a_wrong_value_says_what_is_expected(
    option: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = error(["fit", "--config", QUICKSTART, f"--{option}"], capsys)
    assert said in text
    assert len(text.splitlines()) == 1
