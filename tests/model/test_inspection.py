from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from rich.console import Console

from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.model.hook_points import KINDS
from deeplens_lightning.model.inspection import inspect_model, render
from tests.support.model_families import FAMILIES, tiny_config, tiny_model


@pytest.mark.parametrize("name", FAMILIES)
def test_widths_equal_those_of_the_activations(name: str, tmp_path: Path) -> None:
    tiny_config(name).save_pretrained(tmp_path)
    places = FAMILIES[name].places(1)
    found = inspect_model(str(tmp_path), 1, [kind for kind in KINDS if kind in places])
    assert {offer.name.rpartition(".")[2] for offer in found.offers if offer.d_in} == set(places)
    rows = FrozenModel.load(tiny_model(name), found.chosen, device="cpu").activations(torch.arange(9)[None])
    assert {point.name: point.d_in for point in found.chosen} == {key: x.shape[-1] for key, x in rows.items()}
    assert found.bytes_per_row == sum(x.shape[-1] * x.itemsize for x in rows.values())


def test_the_tables_show_skipped_layers_and_bytes_per_row(tmp_path: Path) -> None:
    tiny_config("mixtral", dtype="bfloat16").save_pretrained(tmp_path)
    found = inspect_model(str(tmp_path), 0, ["mlp_in", "mlp_out"])
    assert (found.depth, found.layers_loaded, found.bytes_per_row) == (3, 1, 2 * 32 * 2)
    assert found.parameters_loaded < found.parameters
    console = Console(width=100, record=True)
    console.print(render(found))
    text = console.export_text()
    for words in (
        "mlp_out",
        "hook_mlp_out",
        "mlp:in",
        "experts",
        "layers.0.mlp_out",
        "128 bytes per row (bfloat16)",
    ):
        assert words in text
    assert "layers skipped     1-2" in text
    assert asdict(found)["chosen"][0]["name"] == "layers.0.mlp_in"


def test_layers_with_different_hook_points_are_listed_separately(tmp_path: Path) -> None:
    tiny_config("deepseek_v3", first_k_dense_replace=1).save_pretrained(tmp_path)
    offers = inspect_model(str(tmp_path)).offers
    assert [offer.layers for offer in offers if offer.name.endswith("mlp_post")] == [(0,), (1, 2)]


def test_a_loaded_model_can_be_inspected() -> None:
    found = inspect_model(tiny_model("llama"), -1, "resid_pre", {"dtype": "float16"})
    assert (found.layers_loaded, found.bytes_per_row, found.dtype) == (3, 64, "float16")
