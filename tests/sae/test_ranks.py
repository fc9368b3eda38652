"""Two real processes train one SAE: weights, counters and metrics are the same on both."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deeplens_lightning.sae import SparseAutoencoder

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run(
        [*command, "-m", "tests.support.sae_ranks_script", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


@pytest.mark.parametrize("architecture", ["topk", "batch_topk"])
def test_ranks_hold_the_same_sae_after_initialisation_and_after_fifty_steps(runs, architecture):
    ranks = [torch.load(runs / f"{architecture}-{rank}.pt", weights_only=True) for rank in (0, 1)]
    for moment in ("start", "end"):
        for name, tensor in ranks[0][moment].items():
            assert torch.equal(tensor, ranks[1][moment][name]), (moment, name)
    assert ranks[0]["start"]["b_dec"].abs().sum() > 0
    assert ranks[0]["end"]["activity.tokens_seen"] == 50 * 64 * 2
    if architecture == "batch_topk":
        assert ranks[0]["end"]["activation.threshold"] > 0


@pytest.mark.parametrize("architecture", ["topk", "batch_topk"])
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
