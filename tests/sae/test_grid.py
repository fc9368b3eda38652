"""SAEs trained side by side equal SAEs trained alone, bit for bit."""

import pytest
import torch

from deeplens_lightning.sae import SparseAutoencoder, SparseAutoencoderGrid
from tests.support.synthetic import Rows, codes, dictionary
from tests.support.training import trainer

D = 16
SHARED = {"d_sae": 128, "lr": 3e-3}


def batches(n: int) -> list[torch.Tensor]:
    return [codes(64, 24, 2, seed=i) @ dictionary(24, D) for i in range(n)]


def test_each_sae_of_a_grid_equals_the_one_trained_alone(tmp_path):
    sweep = [
        {"k": 4, "seed": 0},
        {"k": 8, "lr": 1e-3},
        {"architecture": "batch_topk", "k": 3, "d_sae": 96},
        {"architecture": "gated", "optimization": {"clip_norm": 1e-3}},
    ]
    grid = SparseAutoencoderGrid(D, sweep, SHARED)
    fit = trainer(tmp_path, max_steps=25, log_every_n_steps=5)
    fit.fit(grid, Rows(batches(25), batches(2)))
    for name, chosen in zip(grid.names, sweep, strict=True):
        alone = SparseAutoencoder(D, **{**SHARED, **chosen})
        alone_fit = trainer(tmp_path, max_steps=25, log_every_n_steps=5)
        alone_fit.fit(alone, Rows(batches(25), batches(2)))
        for key, tensor in alone.state_dict().items():
            assert torch.equal(tensor, grid[name].state_dict()[key]), (name, key)
        for metric in ("train/fvu", "val/fvu", "val/dead_fraction"):
            assert fit.callback_metrics[f"{metric}/{name}"] == alone_fit.callback_metrics[metric]


def test_a_sweep_is_the_product_of_its_lists_and_max_steps_counts_batches(tmp_path):
    grid = SparseAutoencoderGrid(D, {"k": [2, 4], "seed": [0, 1]}, SHARED)
    assert grid.names == ["k=2,seed=0", "k=2,seed=1", "k=4,seed=0", "k=4,seed=1"]
    fit = trainer(tmp_path, max_steps=10)
    fit.fit(grid, Rows(batches(10)))
    assert all(sae.activity.tokens_seen == 10 * 64 for sae in grid.saes)
    assert [p.name for p in grid.export_saelens(tmp_path / "out")] == grid.names
    fit.save_checkpoint(tmp_path / "grid.ckpt")
    again = SparseAutoencoderGrid.load_from_checkpoint(tmp_path / "grid.ckpt", weights_only=True)
    assert torch.equal(again["k=4,seed=1"].W_dec, grid["k=4,seed=1"].W_dec)


def test_one_sae_for_each_hook_point_of_a_stream(tmp_path):
    data = [{"a": x, "b": x[:, :8] * 2} for x in batches(10)]
    grid = SparseAutoencoderGrid({"a": D, "b": 8}, {"input_hook": ["a", "b"]}, {"d_sae": 64, "k": 4})
    trainer(tmp_path, max_steps=10).fit(grid, Rows(data))
    assert [sae.W_dec.shape for sae in grid.saes] == [(64, D), (64, 8)]


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"kk": [1]}, "no argument 'kk'; did you mean 'k'"),
        ([{"k": 2}, {"k": 2}], "different SAEs"),
        ([], "at least one"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(sweep, message):
    with pytest.raises(ValueError, match=message):
        SparseAutoencoderGrid(D, sweep, SHARED)


def test_an_unknown_name_lists_the_names_and_the_nearest():
    grid = SparseAutoencoderGrid(D, {"k": [8, 16, 32]}, SHARED)
    with pytest.raises(
        KeyError, match=r"has no SAE '32': did you mean 'k=32'\? its SAEs are 'k=8', 'k=16', 'k=32'"
    ):
        grid["32"]
    with pytest.raises(KeyError, match="has no SAE 32: did you mean 'k=32'"):
        grid[32]
