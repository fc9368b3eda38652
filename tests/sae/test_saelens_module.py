"""Architectures of SAELens train with Lightning and are saved in a format that SAELens reads."""

import lightning as L
import pytest
import torch

from deeplens_lightning.normalization import Moments
from deeplens_lightning.sae import SAELensModule
from tests.support.synthetic import Rows, codes, dictionary
from tests.support.training import trainer

D = 16


@pytest.fixture(autouse=True)
def sae_lens():
    return pytest.importorskip("sae_lens")


def batches(n: int) -> list[torch.Tensor]:
    return [5 * codes(64, 24, 2, seed=i) @ dictionary(24, D) for i in range(n)]


@pytest.mark.parametrize(
    ("config", "normalize"),
    [
        ({"architecture": "matching_pursuit", "max_iterations": 4, "decoder_init_norm": 1.0}, "mean_norm"),
        ({"architecture": "topk", "k": 4, "aux_loss_coefficient": 1.0}, "zscore"),
        ({"architecture": "batchtopk", "k": 4}, "standardize"),
        ({"architecture": "standard", "l1_coefficient": 0.1, "l1_warm_up_steps": 10}, "none"),
    ],
    ids=lambda value: value if isinstance(value, str) else value["architecture"],
)
def test_an_architecture_of_saelens_trains_and_saelens_loads_it(sae_lens, tmp_path, config, normalize):
    raw, moments = batches(120), Moments(D)
    for x in raw:
        moments.update(x)
    scaling = moments.scaling(normalize)
    served = [scaling.apply(x) for x in raw]
    module = SAELensModule(D, {**config, "d_sae": 96}, lr=3e-3)
    fit = trainer(tmp_path, max_steps=120, log_every_n_steps=20)
    fit.fit(module, Rows(served, served[:4], scaling=scaling))
    assert fit.callback_metrics["val/fvu"] < 0.6
    assert {"train/loss", "train/l0"} <= fit.callback_metrics.keys()
    theirs = sae_lens.SAE.load_from_disk(module.export_saelens(tmp_path / "sae"))
    x = torch.cat(raw[:4])
    with torch.no_grad():
        fvu = ((theirs(x) - x) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert fvu < 0.7
    if config["architecture"] not in (
        "batchtopk",
        "matching_pursuit",
    ):  # saved as JumpReLU; a norm's limit moves
        with torch.no_grad():
            torch.testing.assert_close(theirs(x), module(x), rtol=1e-3, atol=1e-3)


def test_a_checkpoint_of_a_saelens_module_loads(tmp_path):
    module, fit = (
        SAELensModule(D, {"architecture": "topk", "k": 4, "d_sae": 64}),
        trainer(tmp_path, max_steps=3),
    )
    fit.fit(module, Rows(batches(3)))
    fit.save_checkpoint(tmp_path / "m.ckpt")
    again = SAELensModule.load_from_checkpoint(tmp_path / "m.ckpt", weights_only=True)
    x = batches(1)[0]
    assert torch.equal(again(x), module(x))


def test_a_config_without_architecture_is_refused():
    with pytest.raises(ValueError, match="needs an architecture"):
        SAELensModule(D, {"d_sae": 64})


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", torch.bfloat16), ("64-true", torch.float64)])
def test_it_trains_in_every_precision_and_counts_steps_in_float32(tmp_path, precision, dtype):
    module = SAELensModule(D, {"architecture": "topk", "k": 4, "d_sae": 96})
    data = batches(3)
    fit = trainer(tmp_path, max_steps=3, precision=precision)
    fit.fit(module, Rows(data, data[:1]))
    assert fit.callback_metrics["val/fvu"].isfinite()
    assert module.steps_since_fired.dtype == torch.float32
    assert module.steps_since_fired.max() == 3
    assert module.sae.W_enc.dtype == dtype
    assert module(data[0]).isfinite().all()


def test_held_out_rows_with_nan_are_left_out_and_counted(tmp_path):
    module, (clean,) = SAELensModule(D, {"architecture": "topk", "k": 4, "d_sae": 96}), batches(1)
    spoiled = torch.cat([clean, torch.full((2, D), torch.nan)])
    figures = []
    for rows in (clean, spoiled):
        fit = trainer(tmp_path)
        fit.validate(module, Rows([], [rows]), verbose=False)
        figures.append(dict(fit.callback_metrics))
    assert (figures[0].pop("val/nonfinite_rows"), figures[1].pop("val/nonfinite_rows")) == (0, 2)
    for name, value in figures[0].items():
        torch.testing.assert_close(figures[1][name], value)


class Noted(L.Callback):
    """Note the learning rate and the largest gradient of every batch."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.largest: list[float] = []

    def on_train_batch_end(self, trainer, module, *_) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.largest.append(max(float(p.grad.abs().max()) for p in module.parameters()))


def test_it_is_planned_and_clipped_as_the_trainer_says(tmp_path):
    module = SAELensModule(D, {"architecture": "topk", "k": 4, "d_sae": 96}, lr=1.0)
    noted = Noted()
    clip = {"gradient_clip_val": 1e-5, "gradient_clip_algorithm": "value"}
    fit = trainer(tmp_path, None, [noted], max_epochs=1, max_steps=99, accumulate_grad_batches=2, **clip)
    fit.fit(module, Rows(batches(5)))
    assert fit.global_step == 3
    assert noted.rates == [1.0, 1.0, 1.0, 1.0, 0.0]
    assert noted.largest[1::2] == pytest.approx([1e-5, 1e-5])


def test_a_precision_in_which_its_epsilon_is_zero_is_refused(tmp_path):
    module = SAELensModule(D, {"architecture": "topk", "k": 4, "d_sae": 96})
    with pytest.raises(ValueError, match="eps=1e-08 is 0 in float16"):
        trainer(tmp_path, max_steps=1, precision="16-true").fit(module, Rows(batches(1)))
