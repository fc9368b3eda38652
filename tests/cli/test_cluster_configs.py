"""The configs for clusters, laid over the configs of experiments."""

from __future__ import annotations

from pathlib import Path

import pytest

from deeplens_lightning.cli.main import main
from tests.cli.parsing import parsed

CONFIGS = Path(__file__).parents[2] / "configs"
EXPERIMENTS = ("quickstart", "gpt2_fineweb")


def laid_over(experiment: str, *cluster: str) -> list[str]:
    paths = [CONFIGS / f"{experiment}.yaml", *(CONFIGS / "cluster" / f"{name}.yaml" for name in cluster)]
    return [word for path in paths for word in ("--config", str(path))]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_one_node_trains_on_all_its_devices(experiment: str) -> None:
    alone, settings = parsed("fit", *laid_over(experiment)), parsed("fit", *laid_over(experiment, "one_node"))
    assert settings["trainer"]["devices"] == "auto"
    assert settings["trainer"]["strategy"] == "ddp"
    assert settings["trainer"]["num_nodes"] == 1
    assert settings["trainer"]["callbacks"] == alone["trainer"]["callbacks"]
    assert (settings["data"], settings["model"]) == (alone["data"], alone["model"])


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_several_nodes_take_ranks_from_slurm_and_requeue(experiment: str) -> None:
    trainer = parsed("fit", *laid_over(experiment, "several_nodes"))["trainer"]
    assert (trainer["accelerator"], trainer["devices"], trainer["num_nodes"]) == ("gpu", 4, 2)
    assert trainer["strategy"] == "ddp"
    [plugin] = trainer["plugins"]
    assert plugin["class_path"].endswith(".SLURMEnvironment")
    assert plugin["init_args"]["auto_requeue"] is True


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_preemptible_run_keeps_its_checkpoints_in_one_folder(experiment: str, tmp_path: Path) -> None:
    words = [*laid_over(experiment, "preemptible"), f"--trainer.default_root_dir={tmp_path}"]
    callbacks = parsed("fit", *words)["trainer"]["callbacks"]
    arguments = {
        (each["class_path"].rpartition(".")[2], each.get("init_args", {}).get("filename")): each.get(
            "init_args", {}
        )
        for each in callbacks
    }
    assert {name for name, _ in arguments} == {
        "ModelCheckpoint", "Preemption", "StreamStatistics", "Throughput", "FitSummary",
    }  # fmt: skip
    folders = [each["dirpath"] for each in arguments.values() if "dirpath" in each]
    assert folders == [str(tmp_path / "checkpoints")] * 3
    every = arguments["ModelCheckpoint", "{step}"]
    assert (every["every_n_train_steps"], every["save_top_k"]) == (500, 2)
    assert (every["monitor"], every["mode"]) == ("step", "max")
    assert ("ModelCheckpoint", "end of {epoch}") in arguments


@pytest.mark.parametrize(
    ("name", "key"),
    [("one_node", "num_nodes"), ("several_nodes", "auto_requeue"), ("preemptible", "every_n_train_steps")],
)
def test_a_misspelled_key_of_a_cluster_config_is_an_error(
    name: str, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (CONFIGS / "cluster" / f"{name}.yaml").read_text()
    assert f"{key}:" in text
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(text.replace(f"{key}:", f"{key}x:"))
    words = [
        *laid_over("quickstart"),
        "--config",
        str(wrong),
        "--trainer.default_root_dir=runs",
        "--print_config",
    ]
    with pytest.raises(SystemExit) as exit_:
        main(["fit", *words])
    assert exit_.value.code == 2
    assert f"{key}x" in capsys.readouterr().err
