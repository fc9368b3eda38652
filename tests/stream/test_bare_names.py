"""What a bare tensor holds is known only where its file name or the user says so, and a wrong claim is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deeplens_lightning.datamodule import ActivationDataModule
from deeplens_lightning.sae import SparseAutoencoder
from deeplens_lightning.shards import ShardError
from tests.support.caches import NARROW, WIDE, write_cache
from tests.support.training import trainer

D = 32  # the width of the tiny models; their MLPs are 64 or 128 wide


@pytest.fixture
def bare(tmp_path: Path) -> str:
    torch.save(torch.randn(200, D), tmp_path / "rows.pt")
    return str(tmp_path / "rows.pt")


def exported(folder: Path, data: ActivationDataModule) -> tuple[dict[str, str], dict[str, Any]]:
    """What an SAE records that it was trained on, and the metadata of its export."""
    sae = SparseAutoencoder(data.d_in, 64, k=4)
    trainer(folder, max_steps=1, limit_val_batches=0).fit(sae, data)
    config = json.loads((sae.export_saelens(folder / "sae") / "cfg.json").read_text())
    return sae.trained_on, config["metadata"]


def test_an_unknown_hook_point_and_model_are_not_recorded(bare: str, tmp_path: Path) -> None:
    data = ActivationDataModule(shards=bare, batch_size=64)
    assert (data.hook_names, data.hf_model, data.d_in) == ((), None, D)
    trained_on, metadata = exported(tmp_path, data)
    assert trained_on == {}
    assert not {"model_name", "hook_name"} & metadata.keys()


def test_what_the_user_names_is_recorded(bare: str, tmp_path: Path, tiny: Callable[[str], str]) -> None:
    data = ActivationDataModule(tiny("gpt2"), 1, "mlp_out", shards=bare, batch_size=64)
    trained_on, metadata = exported(tmp_path, data)
    assert trained_on == {"model_name": tiny("gpt2"), "hook_name": "layers.1.mlp_out"}
    assert trained_on.items() <= metadata.items()


@pytest.mark.parametrize(
    ("layer", "hook"),
    [(3, None), (None, "mlp_act"), ([1, 2], "mlp_act"), (-1, "mlp_act"), (1, ["mlp_in", "mlp_act"])],
)
def test_a_layer_and_hook_that_name_nothing_are_refused(bare: str, layer: Any, hook: Any) -> None:
    with pytest.raises(ShardError, match=r"does not name the rows of bare tensors.*layer=3, hook='mlp_act'"):
        _ = ActivationDataModule(layer=layer, hook=hook, shards=bare).d_in


def test_a_layer_alone_may_repeat_that_of_the_file_name(tmp_path: Path) -> None:
    torch.save(torch.randn(100, D), tmp_path / "features_layer_2_100.pt")
    path = str(tmp_path / "features_layer_2_100.pt")
    assert ActivationDataModule(layer=2, shards=path).hook_names == ("layers.2.mlp_act",)
    assert ActivationDataModule(layer=2, hook="mlp_out", shards=path).hook_names == ("layers.2.mlp_out",)
    for other in ({"layer": 3}, {"layer": 3, "hook": "mlp_act"}, {"hook": "layers.3.mlp_act"}):
        with pytest.raises(ShardError, match=r"layer of 2|a file of layer 2|is not in the shards"):
            _ = ActivationDataModule(shards=path, **other).d_in  # type: ignore[arg-type]


@pytest.mark.parametrize("named", ["bare tensor", "cache"])
def test_rows_of_another_width_than_those_of_the_named_model_are_refused_before_training(
    named: str, bare: str, tmp_path: Path, tiny: Callable[[str], str]
) -> None:
    if named == "cache":
        write_cache(tmp_path / "acts", n=300, shard_rows=100)
        data = ActivationDataModule(tiny("gpt2"), hook=WIDE, shards=str(tmp_path / "acts"))
        assert data.hook_names == (WIDE,) != (NARROW,)
    else:
        data = ActivationDataModule(tiny("gpt2"), 1, "mlp_act", shards=bare)
    width = 16 if named == "cache" else D
    with pytest.raises(
        ShardError,
        match=rf"are {width} wide, and those of hf_model='.*' are \d+ wide: give the hf_model, layer",
    ):
        data.setup("fit")
    with pytest.raises(ValueError, match="layer 9 is out of range"):
        ActivationDataModule(tiny("gpt2"), 9, "mlp_out", shards=bare).setup("fit")


def test_a_model_that_is_not_on_this_machine_is_named_without_a_check(
    bare: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = ActivationDataModule("nobody/no-such-model", 3, "mlp_act", shards=bare, batch_size=64)
    trained_on, _ = exported(tmp_path, data)
    assert trained_on == {"model_name": "nobody/no-such-model", "hook_name": "layers.3.mlp_act"}
    assert "hf_model='nobody/no-such-model' is not on this machine: the widths" in caplog.text
