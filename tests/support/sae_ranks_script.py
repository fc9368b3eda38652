"""Run by test_ranks under torchrun: train on two ranks, and save the state and metrics of each."""

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from deeplens_lightning.sae import SparseAutoencoder
from deeplens_lightning.sae.metrics import HeldOutMetrics
from tests.support.synthetic import Rows, codes, dictionary, trainer


class Watched(SparseAutoencoder):
    """Keeps a copy of its state right after its initialisation."""

    start: dict[str, torch.Tensor] | None = None

    def initialize_from(self, batch) -> None:
        super().initialize_from(batch)
        if self.start is None:
            self.start = snapshot(self)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for architecture in ("topk", "batch_topk"):
        sae = Watched(16, 128, k=4, architecture=architecture, lr=3e-3, dead_after_tokens=320)
        fit = trainer(folder, max_steps=50, strategy="ddp", devices=2, num_sanity_val_steps=0)
        rank = fit.global_rank  # each rank has its own rows, of its own scale and mean
        data = [rows(rank, 1000 * rank + i) for i in range(50)]
        held_out = rows(rank, 5000 + rank)
        fit.fit(sae, Rows(data, [held_out]))
        metrics = {name: float(value) for name, value in fit.callback_metrics.items()}
        result = {"start": sae.start, "end": snapshot(sae), "metrics": metrics, "val": held_out}
        torch.save(result, folder / f"{architecture}-{rank}.pt")
    metrics = HeldOutMetrics(128, 16, torch.device("cpu"))
    if rank == 0:  # the other rank has no rows
        metrics.update(held_out, held_out / 2, held_out.repeat(1, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.save(metrics.compute(), folder / f"one-rank-has-rows-{rank}.pt")
    dist.barrier()


def rows(rank: int, seed: int) -> torch.Tensor:
    return (1 + rank) * (codes(64, 24, 2, seed=seed) @ dictionary(24, 16)) + rank


def snapshot(sae: SparseAutoencoder) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in sae.state_dict().items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
