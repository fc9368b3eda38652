"""The command-line parser: errors are one sentence, and an option for one entry of a dict keeps the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deeplens_lightning.cli.main import lightning_cli, main
from deeplens_lightning.sae import SparseAutoencoder
from tests.cli.parsing import parsed

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
        ("layer", "data.layer"),
        ("batchsize", "data.batch_size"),
        ("k", "model.k"),
        ("text_options.drop_first_n", "data.text_options.drop_first_n"),
        ("data.k", "model.k"),
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
    assert "did you mean 'data.layer'?" in error(["extract", "--out=acts", "--layer=3"], capsys)
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


@pytest.mark.parametrize(
    ("options", "architecture"),
    [
        (["architecture=batch_topk", "architecture.aux_k=4"], {"name": "batch_topk", "aux_k": 4}),
        (["init_args.architecture=batch_topk", "architecture.aux_k=4"], {"name": "batch_topk", "aux_k": 4}),
        (
            ["architecture={name: relu, l1: 2.0}", "architecture.warmup=0.5"],
            {"name": "relu", "l1": 2.0, "warmup": 0.5},
        ),
        (["architecture.aux_k=4"], {"name": "topk", "aux_k": 4}),
        (
            ["architecture.name=jumprelu", "architecture.bandwidth=0.1"],
            {"name": "jumprelu", "bandwidth": 0.1},
        ),
        (["architecture.aux_k=4", "architecture=relu"], "relu"),
    ],
)
def test_one_setting_of_an_architecture_keeps_its_name(options: list[str], architecture: Any) -> None:
    words = [f"--model.{option}" for option in options]
    settings = parsed("fit", "--config", QUICKSTART, *words)
    assert settings["model"]["init_args"]["architecture"] == architecture


def test_one_setting_of_the_architecture_of_a_config_keeps_its_name(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("model: {init_args: {architecture: matryoshka}}")
    words = ["--config", QUICKSTART, "--config", str(config), "--model.architecture.aux_k=4"]
    model = lightning_cli(words, run=False).model
    assert isinstance(model, SparseAutoencoder)
    assert type(model.activation).__name__ == "BatchTopK"
    assert (model.activation.aux_k, len(model.activation.widths)) == (4, 5)  # type: ignore[union-attr]


def test_one_setting_inside_the_shared_settings_of_a_grid_keeps_the_others() -> None:
    words = [
        "--model.shared.architecture.aux_k=4",
        "--model.shared.optimization={warmup: 0.1, clip_norm: 3.0}",
    ]
    grid = str(Path(QUICKSTART).with_name("grid.yaml"))
    settings = parsed("fit", "--config", grid, *words, "--model.shared.optimization.warmup=0.2")
    shared = settings["model"]["init_args"]["shared"]
    assert shared["architecture"] == {"name": "batch_topk", "aux_k": 4}
    assert shared["optimization"] == {"warmup": 0.2, "clip_norm": 3.0}
    assert shared["expansion_factor"] == 4


@pytest.mark.parametrize("name", ["data.zz", "zz"])
def test_a_name_like_no_other_is_not_given_a_suggestion(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = error(["fit", "--config", QUICKSTART, f"--{name}=3"], capsys)
    group = name.rpartition(".")[0]
    assert (
        said
        == f"error: there is no option '{name}'; --{group + '.' if group else ''}help lists the options\n"
    )


def test_yes_or_no_options_need_no_value() -> None:
    options = {
        "data.model_options.compile": ("data", "init_args", "model_options", "compile"),
        "data.text_options.prepend_bos": ("data", "init_args", "text_options", "prepend_bos"),
        "data.resume_anyway": ("data", "init_args", "resume_anyway"),
        "model.skip": ("model", "init_args", "skip"),
        "trainer.fast_dev_run": ("trainer", "fast_dev_run"),
        "trainer.deterministic": ("trainer", "deterministic"),
        "weights_only": ("weights_only",),
    }
    settings = parsed("fit", "--config", QUICKSTART, *(f"--{option}" for option in options))
    for keys in options.values():
        found: Any = settings
        for key in keys:
            found = found[key]
        assert found is True, keys


def test_a_value_of_a_yes_or_no_option_may_stand_apart() -> None:
    words = ["--trainer.fast_dev_run", "2", "--data.model_options.compile", "no", "--trainer.logger", "false"]
    settings = parsed("fit", "--config", QUICKSTART, *words)
    assert settings["trainer"]["fast_dev_run"] == 2
    assert settings["trainer"]["logger"] is False
    assert settings["data"]["init_args"]["model_options"]["compile"] is False


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["fit", "--config", QUICKSTART, "--data.layer"], "--data.layer"),
        (["extract", "--out", "--plan"], "--out"),
    ],
)
def test_an_option_that_needs_a_value_is_named(words: list[str], option: str) -> None:
    with pytest.raises(SystemExit, match=f"{option} needs a value: {option}=VALUE"):
        main(words)


def test_a_value_with_the_name_of_a_yes_or_no_option_stays() -> None:
    with pytest.raises(SystemExit, match="upgrade"):
        main(["verify", "upgrade"])


def test_a_positional_argument_may_follow_a_yes_or_no_option(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="matches nothing"):
        main(["verify", "--upgrade", str(tmp_path / "nowhere")])
