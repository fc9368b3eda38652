"""`layer=` and `hook=` choose among the hook points of a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deeplens_lightning import ActivationDataModule
from deeplens_lightning.shards import Manifest, Rows, ShardError, ShardWriter
from tests.support.recorder import Recorder
from tests.support.training import sae, trainer

WIDTHS = {
    "layers.0.mlp_out": 4,
    "layers.0.resid_post": 5,
    "layers.1.mlp_out": 6,
    "layers.2.mlp_act": 7,
    "final_norm": 8,
}
ROWS = {
    name: torch.randn(600, d_in, generator=torch.Generator().manual_seed(d_in))
    for name, d_in in WIDTHS.items()
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A cache of five hook points; row i is token i % 30 of document i // 30."""
    folder = tmp_path_factory.mktemp("cache")
    described = Manifest(hook_points={n: Rows(d_in=d, dtype="float32") for n, d in WIDTHS.items()})
    index = torch.arange(600)
    where = torch.stack([(index // 30 + 1) * 2**57, index // 30, index % 30, index], 1)
    with ShardWriter(folder, described, shard_bytes=200 * described.row_bytes) as writer:
        writer.append(ROWS, where, source=None, first_row=0)
        writer.finish()
    return str(folder)


@pytest.mark.parametrize(
    ("layer", "hook", "names"),
    [
        (None, None, list(WIDTHS)),
        (1, "mlp_out", ["layers.1.mlp_out"]),
        (None, "mlp_out", ["layers.0.mlp_out", "layers.1.mlp_out"]),
        (0, None, ["layers.0.mlp_out", "layers.0.resid_post"]),
        (None, "blocks.1.hook_mlp_out", ["layers.1.mlp_out"]),
        (None, "ln_final", ["final_norm"]),
        (None, "final_norm", ["final_norm"]),
        (None, "layers.0.resid_post", ["layers.0.resid_post"]),
        ([1, 0], "mlp_out", ["layers.1.mlp_out", "layers.0.mlp_out"]),
        ([2, 1], None, ["layers.2.mlp_act", "layers.1.mlp_out"]),
        (0, ["resid_post", "mlp_out"], ["layers.0.resid_post", "layers.0.mlp_out"]),
        (None, ["resid_post", "layers.1.mlp_out"], ["layers.0.resid_post", "layers.1.mlp_out"]),
        (None, ["blocks.0.hook_resid_post", "final_norm"], ["layers.0.resid_post", "final_norm"]),
    ],
)
def test_layer_and_hook_choose_among_the_hook_points_of_a_cache(
    cache: str, layer: Any, hook: Any, names: list[str]
) -> None:
    data = ActivationDataModule(shards=cache, layer=layer, hook=hook)
    assert list(data.hook_names) == names
    assert data.d_in == (WIDTHS[names[0]] if len(names) == 1 else {name: WIDTHS[name] for name in names})


@pytest.mark.parametrize(
    ("layer", "hook"),
    [
        (7, None),
        (None, "mlp_in"),
        (1, "resid_post"),
        ([0, 7], "mlp_out"),
        (None, ["mlp_out", "layers.9.mlp_out"]),
    ],
)
def test_a_choice_that_the_cache_does_not_hold_is_refused_with_what_it_holds(
    cache: str, layer: Any, hook: Any
) -> None:
    with pytest.raises(ShardError) as error:
        ActivationDataModule(shards=cache, layer=layer, hook=hook).prepare_data()
    assert f"the shards, which hold {', '.join(WIDTHS)};" in str(error.value)
    assert f"layer={layer!r}, hook={hook!r}" in str(error.value)


def test_one_sae_trains_on_one_hook_point_of_a_cache_of_several(cache: str, tmp_path: Path) -> None:
    data = ActivationDataModule(shards=cache, layer=1, hook="mlp_out", batch_size=50, val_fraction=0.0)
    recorder, module = Recorder(), sae(data)
    before = module.W_enc.detach().clone()
    trainer(tmp_path, recorder, max_epochs=2).fit(module, data)
    assert len(recorder.batches) == 2 * 600 / 50
    for batch, rows in recorder.batches:
        assert torch.equal(batch, ROWS["layers.1.mlp_out"][rows[:, 1] * 30 + rows[:, 2]])
    served = torch.cat([rows for _, rows in recorder.batches])
    assert (torch.unique(served, dim=0, return_counts=True)[1] == 2).all()
    assert not torch.equal(module.W_enc, before)
