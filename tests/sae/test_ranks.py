"""Two real processes train one SAE: weights, counters and metrics are the same on both."""

import warnings
from pathlib import Path

import lightning as L
import pytest
import torch

from deeplens_lightning.sae import SparseAutoencoder
from deeplens_lightning.sae.metrics import HeldOutMetrics
from deeplens_lightning.sae.nonfinite import NonFiniteRowsError
from deeplens_lightning.types import Provenance
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


class Broadcast(L.Callback):
    """Let DDP overwrite buffers by those of rank 0 in every forward pass, or not."""

    def __init__(self, broadcast: bool) -> None:
        self.broadcast = broadcast

    def on_train_start(self, trainer, pl_module) -> None:
        trainer.strategy.model.broadcast_buffers = self.broadcast


class Placed(Rows):
    """Row i of every batch of a rank comes from document 100 * rank + i."""

    def __init__(self, rank: int, *args) -> None:
        super().__init__(*args)
        self.rank = rank

    def provenance(self, batch):
        row = torch.arange(len(batch))
        return Provenance(row, row + 100 * self.rank, row, row)


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
    left_out(rank, ranks, folder)
    torch.distributed.barrier()


def spoiled(x: torch.Tensor, *places: int) -> torch.Tensor:
    x = x.clone()
    x[list(places), 3] = torch.nan
    return x


def left_out(rank: int, ranks: int, folder: Path) -> None:
    """Train on rows with NaN, another number on each rank, and on a last batch that is shorter on rank 1."""
    data = [rows(rank, 1000 * rank + i) for i in range(4)]
    data[1] = spoiled(data[1], *((5,) if rank == 0 else (7, 9)))
    data[2] = torch.zeros_like(data[2]) if rank == 0 else data[2]
    data[3] = data[3][: 64 - 24 * rank]
    for broadcast in (True, False):
        sae = SparseAutoencoder(16, 128, k=4, architecture="batch_topk", on_nonfinite="skip")
        run = trainer(folder, None, [Broadcast(broadcast)], max_steps=4, strategy="ddp", devices=ranks)
        run.fit(sae, Rows(data, [spoiled(rows(rank, 5000), *range(rank + 1))]))
        result = {"end": snapshot(sae), "held out": run.callback_metrics["val/nonfinite_rows"]}
        torch.save(result, folder / f"left-out-{broadcast}-{rank}.pt")


def stopped(rank: int, ranks: int, folder: Path) -> list[str]:
    """Errors of this rank where only rank 1 has rows with NaN: in training, and in validation."""
    data = [rows(rank, 1000 * rank + i) for i in range(4)]
    bad = [*data[:2], spoiled(data[2], 7, 9) if rank == 1 else data[2], data[3]]
    errors = []
    for batches in ((bad, data[:1]), (data, [data[0], bad[2]])):
        run = trainer(folder, max_steps=4, strategy="ddp", devices=ranks)
        with pytest.raises(NonFiniteRowsError) as error:
            run.fit(SparseAutoencoder(16, 128, k=4), Placed(rank, *batches))
        errors.append(str(error.value))
    return errors


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


@pytest.mark.parametrize("broadcast", [True, False])
def test_counters_are_the_same_on_all_ranks_whether_ddp_broadcasts_them_or_not(runs, broadcast):
    ranks = [torch.load(runs / f"left-out-{broadcast}-{rank}.pt", weights_only=True) for rank in (0, 1)]
    for run in ranks:
        assert run["end"]["nonfinite_rows"] == run["held out"] == 3
        assert run["end"]["activity.tokens_seen"] == 3 * 128 + 64 + 40
        assert all(tensor.isfinite().all() for tensor in run["end"].values())
    for name, tensor in ranks[0]["end"].items():
        assert torch.equal(tensor, ranks[1]["end"][name]), name


def test_all_ranks_raise_the_same_error_that_names_the_rank_and_the_place(tmp_path):
    mine, other = launch(2, stopped, tmp_path, seconds=60)
    assert mine == other
    place = "first is row 7: document 107, position 7, token 7"
    assert f"2 of 128 rows hold NaN or infinity (rank 1, step 2, {place})" in mine[0]
    assert f"2 of 128 held-out rows hold NaN or infinity (rank 1, held-out batch 0, {place})" in mine[1]
