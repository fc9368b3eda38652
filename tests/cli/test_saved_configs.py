"""Options of groups reach the data module, and the config that a run saves runs again unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from deeplens_lightning.cli.main import lightning_cli, main
from deeplens_lightning.datamodule import ActivationDataModule
from deeplens_lightning.options import BufferOptions, CacheOptions, ModelOptions, TextOptions

CONFIGS = Path(__file__).parents[2] / "configs"
LIVE = [
    "--data.text_options.drop_first_n=1",
    "--data.text_options.prepend_bos=true",
    "--data.buffer_options.max_norm_ratio=3",
    "--data.buffer_options.shuffle_blocks=false",
    "--data.model_options.isolation=padded",
]
CACHED = [
    "--data.cache_options.shuffle=window",
    "--data.cache_options.checksums=true",
    "--data.buffer_options.device=cpu",
]


@pytest.fixture
def cache(small: list[str], tmp_path: Path) -> Path:
    """A small cache of two hook points."""
    data = [word for word in small if word.startswith("--data") and "max_tokens" not in word]
    main(["extract", *data, "--data.hook=[mlp_act,mlp_out]", f"--out={tmp_path / 'acts'}"])
    return tmp_path / "acts"


def run_twice(words: list[str], folder: Path) -> dict[str, dict[str, object]]:
    """Run `fit`, run its saved config again, and check that config and weights are the same.

    Returns:
        The groups of options in the saved config.
    """
    main(["fit", *words, "--seed_everything=1"])
    (first,) = folder.rglob("config.yaml")
    main(["fit", "--config", str(first)])
    (second,) = set(folder.rglob("config.yaml")) - {first}
    saved = yaml.safe_load(first.read_text())
    assert yaml.safe_load(second.read_text()) == saved
    one, other = (
        torch.load(next(config.parent.rglob("*.ckpt")), weights_only=True)["state_dict"]
        for config in (first, second)
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    settings: dict[str, dict[str, object]] = saved["data"]["init_args"]
    return settings


def test_options_of_groups_reach_the_live_data_module(small: list[str]) -> None:
    words = ["--config", str(CONFIGS / "quickstart.yaml"), *small, *LIVE]
    data = lightning_cli(words, run=False).datamodule
    assert isinstance(data, ActivationDataModule)
    assert data.settings.text_options == TextOptions(drop_first_n=1, prepend_bos=True)
    assert data.settings.buffer_options == BufferOptions(max_norm_ratio=3.0, shuffle_blocks=False)
    assert data.settings.model_options == ModelOptions(isolation="padded")


def test_options_of_groups_reach_the_data_module_of_a_cache(cache: Path) -> None:
    words = ["--config", str(CONFIGS / "cached.yaml"), f"--data.shards={cache}", *CACHED]
    data = lightning_cli([*words, "--data.hook=mlp_out"], run=False).datamodule
    assert isinstance(data, ActivationDataModule)
    assert data.settings.cache_options == CacheOptions(shuffle="window", checksums=True)
    assert data.settings.buffer_options == BufferOptions(device="cpu")
    assert data.hook_names == ("layers.1.mlp_out",)


def test_the_saved_config_of_a_live_run_runs_again(small: list[str], tmp_path: Path) -> None:
    settings = run_twice(["--config", str(CONFIGS / "quickstart.yaml"), *small, *LIVE], tmp_path / "runs")
    assert settings["text_options"]["drop_first_n"] == 1
    assert settings["buffer_options"]["max_norm_ratio"] == 3.0
    assert settings["model_options"]["isolation"] == "padded"


def test_the_saved_config_of_a_run_on_shards_runs_again(cache: Path, tmp_path: Path) -> None:
    words = [
        *("--config", str(CONFIGS / "cached.yaml")),
        f"--data.shards={cache}",
        "--data.batch_size=64",
        "--data.max_tokens=640",
        "--data.hook=mlp_out",
        f"--trainer.logger.init_args.save_dir={tmp_path / 'runs'}",
        f"--trainer.default_root_dir={tmp_path / 'runs'}",
        "--trainer.accelerator=cpu",
    ]
    settings = run_twice([*words, *CACHED], tmp_path / "runs")
    assert settings["cache_options"]["shuffle"] == "window"
