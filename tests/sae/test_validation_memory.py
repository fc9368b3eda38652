"""Validation never holds the latents of a whole batch."""

import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deeplens_lightning.sae import Dictionary, forward
from tests.support.ranks import ROOT

EVERY = ["topk", "batch_topk", "matryoshka", "relu", "jumprelu", "gated"]


class Largest(TorchDispatchMode):
    """Find the number of bytes of the largest tensor that an operation makes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() * x.element_size() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.bytes = max([self.bytes, *sizes])
        return result


@pytest.mark.parametrize("architecture", EVERY)
def test_validation_works_on_few_rows_at_a_time_with_the_same_figures(monkeypatch, architecture):
    sae = Dictionary(8, 512, k=4, architecture=architecture)
    rows = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    sae.prepare(None)
    sae.initialize_from(rows)
    sae.step(rows)
    whole, chunked = sae.new_metrics(), sae.new_metrics()
    sae.measure(rows, whole)
    monkeypatch.setattr(forward, "CHUNK_BYTES", 128 * 4 * 512)
    with Largest() as largest:
        sae.measure(rows, chunked)
    assert largest.bytes <= 2 * 128 * 4 * 512  # `topk` makes two results
    for name, value in whole.compute().items():
        torch.testing.assert_close(chunked.compute()[name], value, rtol=1e-6, atol=1e-9)


MEASURE = """
import re, sys
from pathlib import Path
import torch
from deeplens_lightning.sae import Dictionary

def megabytes(name):
    return int(re.search(rf"{name}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

sae = Dictionary(32, 131_072, k=32, architecture=sys.argv[1])
rows = torch.randn(4096, 32)
sae.prepare(None)
sae.initialize_from(rows[:64])
Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
before, metrics = megabytes("VmRSS"), sae.new_metrics()
sae.measure(rows, metrics)
assert metrics.compute()["rows"] == 4096
print(megabytes("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the memory from /proc")
@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "jumprelu"])
def test_validation_of_131072_latents_stays_below_500_mb_above_the_weights(architecture):
    command = [sys.executable, "-c", MEASURE, architecture]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 500
