"""BatchTopK's threshold follows the latents while they change fast, and is steady when they do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deeplens_lightning.sae import SparseAutoencoder
from deeplens_lightning.sae.activations import BatchTopK
from tests.support.synthetic import Rows, codes, dictionary
from tests.support.training import trainer

K = 8
TRUE = dictionary(64, 32)


def batches(count: int, offset: int = 0) -> list[torch.Tensor]:
    return [codes(512, 64, K, seed=offset + i) @ TRUE for i in range(count)]


def observed(values: torch.Tensor, momentum: float = 0.99) -> float:
    activation = BatchTopK(64, 4, 16, threshold_momentum=momentum)
    for value in values:
        activation.observe(value)
    return float(activation.threshold)


@pytest.mark.parametrize("steps", [10, 19, 60])
def test_held_out_l0_is_near_k_from_the_first_steps_on(steps: int, tmp_path: Path) -> None:
    sae = SparseAutoencoder(32, 512, k=K, architecture="batch_topk", lr=5e-3)
    fit = trainer(tmp_path, max_steps=steps)
    fit.fit(sae, Rows(batches(steps), batches(2, offset=900)))
    assert float(fit.callback_metrics["val/l0"]) == pytest.approx(K, rel=0.25)


def test_the_threshold_is_the_first_value_and_then_follows_a_change_within_a_fifth_of_the_batches() -> None:
    assert observed(torch.tensor([0.3])) == pytest.approx(0.3)
    for count in (20, 200, 900):
        change = torch.cat([torch.full((count,), 0.3), torch.full((count // 5,), 0.1)])
        assert observed(change) == pytest.approx(0.1, abs=0.02)


def test_the_threshold_averages_noise_as_long_as_its_momentum_says() -> None:
    noise = 0.1 * torch.randn(10, 400, generator=torch.Generator().manual_seed(0))
    thresholds = [observed(1 + part, momentum=0.9) for part in noise]
    expected = 0.1 * ((1 - 0.9) / (1 + 0.9)) ** 0.5
    assert 0.3 * expected < float(torch.tensor(thresholds).std()) < 2 * expected
