"""Held-out metrics: exact sums that are no part of the module, its checkpoint or its precision."""

import warnings

import lightning as L
import pytest
import torch
from torchmetrics import Metric

from deeplens_lightning.sae import SparseAutoencoder
from deeplens_lightning.sae import metrics as metrics_module
from deeplens_lightning.sae.metrics import HeldOutMetrics
from tests.support.synthetic import Rows, codes, dictionary
from tests.support.training import trainer

D = 16
CPU = torch.device("cpu")


def batches(n: int) -> list[torch.Tensor]:
    return [codes(64, 24, 2, seed=i) @ dictionary(24, D) for i in range(n)]


class Watch(L.Callback):
    """Store the dtypes of the sums at the end of every validation."""

    def __init__(self) -> None:
        self.dtypes: list[torch.dtype] = []

    def on_validation_end(self, trainer, pl_module):
        self.dtypes += [metrics.sums.dtype for metrics in pl_module._held_out.values()]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_sums_are_float64_and_no_part_of_the_module(tmp_path, precision):
    sae, watch = SparseAutoencoder(D, 64, k=4), Watch()
    keys = list(sae.state_dict())
    fit = trainer(tmp_path, max_steps=4, precision=precision, callbacks=[watch])
    fit.fit(sae, Rows(batches(4), batches(2)))
    fit.validate(sae, Rows([], batches(2)), verbose=False)
    assert set(watch.dtypes) == {torch.float64}
    assert list(sae.state_dict()) == keys
    assert not [module for module in sae.modules() if isinstance(module, Metric)]


def test_metrics_equal_a_direct_computation():
    g = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(100, D, generator=g, dtype=torch.float64) for _ in range(2))
    x_hat = 0.7 * x + 0.2 * noise
    z = torch.randn(100, 64, generator=g).relu()
    z[:, :8] = 0
    metrics = HeldOutMetrics(64, D, CPU)
    for part in (slice(0, 30), slice(30, 100)):
        metrics.update(x[part], x_hat[part], z[part])
    found = metrics.compute()
    assert found["rows"] == 100
    torch.testing.assert_close(found["fvu"], (x - x_hat).square().sum() / (x - x.mean(0)).square().sum())
    torch.testing.assert_close(found["cosine"], torch.cosine_similarity(x, x_hat).mean())
    torch.testing.assert_close(found["shrinkage"], x_hat.square().sum() / (x * x_hat).sum())
    torch.testing.assert_close(found["l0"], (z > 0).sum(1).double().mean())
    assert found["dead_fraction"] == 8 / 64


def test_no_rows_give_no_metrics_and_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert HeldOutMetrics(64, D, CPU).compute() == {}


def test_sums_on_a_device_without_float64_are_as_exact(monkeypatch):
    g = torch.Generator().manual_seed(0)
    rows = [
        10 + torch.randn(32, D, generator=g) for _ in range(3000)
    ]  # a hundred times the energy of what varies
    latents = torch.zeros(32, 64)
    figures = []
    for types in (("cpu",), ()):
        monkeypatch.setattr(metrics_module, "HAVE_FLOAT64", types)
        metrics = HeldOutMetrics(64, D, CPU)
        for x in rows:
            metrics.update(x, x + 0.1, latents)
        figures.append(metrics.compute())
    assert metrics.sums.dtype == torch.float32
    for name, value in figures[0].items():
        torch.testing.assert_close(figures[1][name], value, rtol=1e-5, atol=0)
