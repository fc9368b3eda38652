"""Training on `ActivationDataModule`: transcoders, crosscoders, one SAE for each hook point, resuming."""

from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from deeplens_lightning import ActivationDataModule
from deeplens_lightning.sae import SparseAutoencoder, SparseAutoencoderGrid
from tests.support import training
from tests.support.texts import texts
from tests.support.training import trainer


def data(tiny, **settings) -> ActivationDataModule:
    sizes = {"seq_length": 64, "inference_batch_size": 8, "batch_size": 128, "buffer_size": 1024}
    held_out = {"val_fraction": 0.05, "val_rows": 1000}
    return training.data(tiny("llama"), texts(300, 900), **(sizes | held_out | settings))


def test_a_transcoder_predicts_the_mlp_better_than_its_mean(tiny, tmp_path):
    dm = data(tiny, hook=["mlp_in", "mlp_out"])
    read, write = dm.hook_names
    sae = SparseAutoencoder(dm.d_in, 256, k=8, input_hook=read, output_hook=write, skip=True, lr=3e-3)
    fit = trainer(tmp_path, max_steps=150)
    fit.fit(sae, dm)
    assert fit.validate(sae, dm, verbose=False)[0]["val/fvu"] < 0.8  # predicting the mean gives 1


def test_a_crosscoder_beats_per_layer_saes_of_the_same_total_l0(tiny, tmp_path):
    hooks = {"layer": [0, 1], "hook": "resid_post", "normalize": "standardize"}
    dm = data(tiny, **hooks)
    shared = {"d_sae": 256, "lr": 3e-3}
    crosscoder = SparseAutoencoder(dm.d_in, k=8, **shared)
    fit = trainer(tmp_path, max_steps=200)
    fit.fit(crosscoder, dm)
    joint = fit.validate(crosscoder, dm, verbose=False)[0]["val/fvu"]
    grid = SparseAutoencoderGrid(dm.d_in, {"input_hook": list(dm.hook_names)}, {"k": 4, **shared})
    fit = trainer(tmp_path, max_steps=200)
    fit.fit(grid, data(tiny, **hooks))
    metrics = fit.validate(grid, data(tiny, **hooks), verbose=False)[0]
    apart = sum(metrics[f"val/fvu/{name}"] for name in grid.names) / 2
    assert joint < apart


def shipped(name: str, **changes) -> tuple[dict, dict]:
    """Arguments of the data module and of the SAE in a shipped config, made shorter."""
    config = yaml.safe_load((Path(__file__).parents[2] / "configs" / f"{name}.yaml").read_text())
    data, model = (config[part]["init_args"] for part in ("data", "model"))
    return data | {"max_tokens": 100 * 1024, "val_rows": 10_000, "device": "cpu"}, model | changes


def held_out_fvu(sae: SparseAutoencoder | SparseAutoencoderGrid, data: dict, folder: Path) -> list[float]:
    fit = trainer(folder, max_steps=100)
    fit.fit(sae, ActivationDataModule(**data))
    found = fit.validate(sae, ActivationDataModule(**data), verbose=False)[0]
    return [value for name, value in found.items() if name.startswith("val/fvu")]


@pytest.mark.slow
def test_the_shipped_transcoder_beats_the_mean(tmp_path):
    data, model = shipped("transcoder")
    sae = SparseAutoencoder(ActivationDataModule(**data).d_in, **model)
    (fvu,) = held_out_fvu(sae, data, tmp_path)
    assert fvu < 0.5  # predicting the mean gives 1


@pytest.mark.slow
def test_the_shipped_crosscoder_beats_saes_of_each_layer_at_equal_l0(tmp_path):
    data, model = shipped("crosscoder")
    d_in = ActivationDataModule(**data).d_in
    (joint,) = held_out_fvu(SparseAutoencoder(d_in, **model), data, tmp_path)
    k = model.pop("k") // len(d_in)  # as many active latents a row, all SAEs together
    apart = SparseAutoencoderGrid(d_in, {"input_hook": list(d_in)}, {"k": k, **model})
    each = held_out_fvu(apart, data, tmp_path)
    assert len(each) == 2
    assert joint < sum(each) / 2  # rows are standardised: both layers weigh the same


@pytest.mark.parametrize("architecture", ["topk", "batch_topk"])
def test_a_run_stopped_and_resumed_on_the_stream_is_the_uninterrupted_run(tiny, tmp_path, architecture):
    def run(steps_saved: int, folder: str, ckpt=None) -> SparseAutoencoder:
        sae = SparseAutoencoder(32, 128, k=4, architecture=architecture, dead_after_tokens=600)
        saver = ModelCheckpoint(tmp_path / folder, "stop", every_n_train_steps=steps_saved, save_top_k=-1)
        fit = trainer(tmp_path, max_steps=20, callbacks=[saver])
        fit.fit(sae, data(tiny, hook="mlp_out", normalize="mean_norm"), ckpt_path=ckpt)
        return sae

    whole = run(7, "a")
    resumed = run(100, "b", tmp_path / "a" / "stop.ckpt")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_an_sae_of_another_width_is_refused_before_training(tiny, tmp_path):
    with pytest.raises(ValueError, match="the data serves d_in=32, but the SAE was built for 48"):
        trainer(tmp_path, max_steps=1).fit(SparseAutoencoder(48, 96, k=4), data(tiny, hook="mlp_out"))
