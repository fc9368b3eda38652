"""Thresholds, normalisation, running means and counters are the same in every precision that weights are converted to."""

import pytest
import torch

from deeplens_lightning.normalization import Scaling
from deeplens_lightning.sae import Dictionary, SparseAutoencoder
from deeplens_lightning.sae.forward import dense_pass, sparse_pass
from tests.support.synthetic import Rows, codes, dictionary
from tests.support.training import trainer

D, N = 16, 24
TRUE = dictionary(N, D)
UNITS = ("shift", "scale", "unit", "factor", "offset")
KEPT = {f"{side}.{name}" for side in ("read", "write") for name in UNITS} | {"activation.threshold"}
SCALING = Scaling(torch.full((D,), 39.54), torch.linspace(0.5, 2, D))
CONVERSIONS = {
    "bfloat16": lambda sae: sae.bfloat16(),
    "half": lambda sae: sae.half(),
    "double": lambda sae: sae.double(),
    "to": lambda sae: sae.to("cpu", torch.float16),
}


def batches(n: int, offset: int = 0) -> list[torch.Tensor]:
    return [codes(64, N, 2, seed=offset + i) @ TRUE for i in range(n)]


def raw(x: torch.Tensor) -> torch.Tensor:
    return SCALING.undo(x)


def tensors(sae: Dictionary) -> dict[str, torch.Tensor]:
    return dict(sae.named_parameters()) | dict(sae.named_buffers())


def trained(architecture: str = "batch_topk") -> Dictionary:
    """A dictionary with thresholds and normalisation that bfloat16 would round."""
    sae = Dictionary(D, 128, k=4, architecture=architecture)
    sae.prepare(SCALING)
    sae.initialize_from(batches(1)[0])
    with torch.no_grad():
        sae.activation.threshold.fill_(0.1242)
    return sae


@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("architecture", ["batch_topk", "jumprelu"])
def test_a_conversion_leaves_thresholds_and_normalisation_as_they_are(architecture, conversion):
    sae = trained(architecture)
    before = {name: tensor.clone() for name, tensor in tensors(sae).items()}
    CONVERSIONS[conversion](sae)
    for name, tensor in tensors(sae).items():
        if name in KEPT:
            assert torch.equal(tensor, before[name]), name
            assert tensor.dtype == torch.float32, name
        elif before[name].is_floating_point():
            assert tensor.dtype == sae.W_enc.dtype != torch.float32, name


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
@pytest.mark.parametrize("architecture", ["batch_topk", "jumprelu"])
def test_a_trainer_trains_and_saves_them_in_float32(tmp_path, architecture, precision):
    fit = trainer(tmp_path, max_steps=4, precision=precision, log_every_n_steps=1)
    with fit.init_module():  # the default dtype is that of the precision
        sae = SparseAutoencoder(D, 128, k=4, architecture=architecture, optimization={"eps": 1e-4})
    fit.fit(sae, Rows(batches(4), batches(1, offset=9), SCALING))
    fit.save_checkpoint(tmp_path / "sae.ckpt")
    saved = torch.load(tmp_path / "sae.ckpt", weights_only=True)["state_dict"]
    assert {name for name, tensor in saved.items() if tensor.dtype == torch.float32} == KEPT & set(saved)
    assert torch.equal(saved["read.shift"], SCALING.shift)
    assert all(value.isfinite() for value in fit.callback_metrics.values())


def test_the_running_mean_of_a_bfloat16_module_does_not_stall():
    sae = trained().bfloat16()
    for smallest in [0.1416] * 100 + [0.12] * 600:
        sae.activation.observe(torch.tensor(smallest, dtype=torch.bfloat16))
    assert float(sae.activation.threshold) == pytest.approx(0.12, rel=2e-3)


@pytest.mark.parametrize("architecture", ["batch_topk", "relu", "jumprelu", "gated"])
def test_a_bfloat16_module_reads_rows_far_from_zero_as_exactly_as_its_weights(architecture):
    sae, x = Dictionary(D, 128, k=4, architecture=architecture), batches(1)[0]
    sae.prepare(SCALING)
    sae.initialize_from(x)
    with torch.no_grad():
        expected = sae(raw(x))
        sae.bfloat16()
        found = sae(raw(x))
    spread = (raw(x) - raw(x).mean(0)).norm()  # a shift of 39.5 for 39.54 is half of it
    assert (found - expected).norm() < 0.05 * spread
    assert found.dtype == torch.float32
    assert sae(raw(x).bfloat16()).dtype == sae.decode(sae.encode(raw(x))).dtype == torch.bfloat16


def test_a_checkpoint_saved_in_bfloat16_loads_under_the_same_names():
    old = {
        name: tensor.bfloat16() if tensor.is_floating_point() else tensor
        for name, tensor in trained().state_dict().items()
    }
    units = [f"{side}.{name}" for side in ("read", "write") for name in UNITS[:3]]
    counters = ["activity.silent_tokens", "activity.tokens_seen", "activation.threshold_batches"]
    weights = ["W_enc", "b_enc", "W_dec", "b_dec"]
    assert old.keys() == {
        *units,
        *counters,
        *weights,
        "activation.threshold",
        "nonfinite_rows",
        "initialized",
    }
    sae = Dictionary(D, 128, k=4, architecture="batch_topk").bfloat16()
    sae.load_state_dict(old)
    assert sae.activation.threshold.dtype == torch.float32
    assert sae.activation.threshold == old["activation.threshold"].float()


def test_latents_are_counted_beyond_the_largest_odd_number_of_bfloat16():
    sae = Dictionary(D, 32, k=2).bfloat16()
    x = torch.randn(4096, D, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[:, 0] += 9  # the same latents are active in most rows
    sparse, dense = (
        sparse_pass(x, sae.weights, sae.activation),
        dense_pass(x, x, sae.weights, sae.activation, 1),
    )
    assert sparse.active == dense.active > 4096


def test_the_gradient_of_a_bias_is_summed_over_all_rows_in_bfloat16():
    x = torch.randn(4096, D, generator=torch.Generator().manual_seed(0))
    x[:, 0] += 9
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        sae = Dictionary(D, 32, k=2, kernel="sparse").to(dtype)
        sparse_pass(x.to(dtype), sae.weights, sae.activation).reconstructions.sum().backward()
        grads.append(sae.b_enc.grad.float())
    assert (grads[1] - grads[0]).norm() < 0.03 * grads[0].norm()
