"""Two real processes train one SAE: weights, counters and metrics are the same on both."""

import warnings
from pathlib import Path

import pytest
import torch

from deeplens_lightning.sae import SparseAutoencoder
from deeplens_lightning.sae.metrics import HeldOutMetrics
from tests.support.ranks import launch
from tests.support.synthetic import Rows, codes, dictionary
from tests.support.training import trainer

ARCHITECTURES = ("topk", "batch_topk")


class Watched(SparseAutoencoder):
    """Store a copy of the state directly after the initialisation from data."""

    start: dict[str, torch.Tensor] | None = None

    def initialize_from(self, batch) -> None:
        super().initialize_from(batch)
        if self.start is None:
            self.start = snapshot(self)


def snapshot(sae: SparseAutoencoder) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in sae.state_dict().items()}


def rows(rank: int, seed: int) -> torch.Tensor:
    """Rows `(64, 16)`; each rank has its own scale and mean."""
    return (1 + rank) * (codes(64, 24, 2, seed=seed) @ dictionary(24, 16)) + rank


def fit(rank: int, ranks: int, folder: Path) -> None:
    """Train both architectures on this rank and save its state and metrics."""
    held_out = rows(rank, 5000 + rank)
    for architecture in ARCHITECTURES:
        sae = Watched(16, 128, k=4, architecture=architecture, lr=3e-3, dead_after_tokens=320)
        run = trainer(folder, max_steps=50, strategy="ddp", devices=ranks)
        assert run.global_rank == rank
        data = [rows(rank, 1000 * rank + i) for i in range(50)]
        run.fit(sae, Rows(data, [held_out]))
        metrics = {name: float(value) for name, value in run.callback_metrics.items()}
        result = {"start": sae.start, "end": snapshot(sae), "metrics": metrics, "val": held_out}
        torch.save(result, folder / f"{architecture}-{rank}.pt")
    metrics = HeldOutMetrics(128, 16, torch.device("cpu"))
    if rank == 0:  # the other rank has no rows
        metrics.update(held_out, held_out / 2, held_out.repeat(1, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.save(metrics.compute(), folder / f"one-rank-has-rows-{rank}.pt")
    torch.distributed.barrier()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    launch(2, fit, folder)
    return folder


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ranks_hold_the_same_sae_after_initialisation_and_after_fifty_steps(runs, architecture):
    ranks = [torch.load(runs / f"{architecture}-{rank}.pt", weights_only=True) for rank in (0, 1)]
    for moment in ("start", "end"):
        for name, tensor in ranks[0][moment].items():
            assert torch.equal(tensor, ranks[1][moment][name]), (moment, name)
    assert ranks[0]["start"]["b_dec"].abs().sum() > 0
    assert ranks[0]["end"]["activity.tokens_seen"] == 50 * 64 * 2
    if architecture == "batch_topk":
        assert ranks[0]["end"]["activation.threshold"] > 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_held_out_metrics_are_those_of_all_ranks_rows_together(runs, architecture):
    ranks = [torch.load(runs / f"{architecture}-{rank}.pt", weights_only=True) for rank in (0, 1)]
    sae = SparseAutoencoder(16, 128, k=4, architecture=architecture)
    sae.load_state_dict(ranks[0]["end"])
    x = torch.cat([run["val"] for run in ranks])
    with torch.no_grad():
        fvu = ((x - sae(x)) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    for run in ranks:
        assert run["metrics"]["val/fvu"] == pytest.approx(float(fvu), rel=1e-4)
        assert run["metrics"]["val/rows"] == len(x)


def test_a_rank_without_rows_gets_the_metrics_of_the_others_without_a_warning(runs):
    ranks = [torch.load(runs / f"one-rank-has-rows-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    assert ranks[0]["rows"] == 64
    assert ranks[0]["shrinkage"] == pytest.approx(0.5)
