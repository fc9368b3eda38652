"""`trainer.predict` gives the active latents of each row, where the row is from, and needs little memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from deeplens_lightning.datamodule import ActivationDataModule
from deeplens_lightning.sae import SparseAutoencoder, SparseAutoencoderGrid, SparseLatents, forward, sparse
from deeplens_lightning.sae.nonfinite import NonFiniteRowsError
from deeplens_lightning.sae.prediction import active_latents
from tests.sae.test_validation_memory import EVERY, Largest
from tests.support.ranks import ROOT
from tests.support.synthetic import Rows
from tests.support.training import data, sae, trainer


def heldout(dm: ActivationDataModule) -> tuple[torch.Tensor, torch.Tensor]:
    """All validation rows, raw, and their provenance `(n, 4)`."""
    dm.setup("predict")
    rows, origins = [], []
    for batch in dm.val_dataloader():
        provenance = dm.provenance(batch)
        assert provenance is not None
        rows.append(batch)
        origins.append(provenance.stacked())
    dm.teardown("predict")
    return torch.cat(rows), torch.cat(origins)


def test_predictions_are_the_latents_of_raw_rows_with_their_provenance(
    tiny: Callable[[str], str], tmp_path: Path
) -> None:
    dm = data(tiny("gpt2"), normalize="zscore", val_rows=100)
    autoencoder, run = sae(dm), trainer(tmp_path, max_steps=5)
    run.fit(autoencoder, dm)
    found = run.predict(autoencoder, dm)
    assert found is not None
    x, origins = heldout(data(tiny("gpt2"), val_rows=100))
    assert [each.shape for each in found] == [(16, 64)] * 6 + [(4, 64)]
    torch.testing.assert_close(
        torch.cat([each.dense() for each in found]), autoencoder.encode(x).detach(), rtol=1e-4, atol=1e-5
    )
    assert torch.equal(torch.cat([each.provenance.stacked() for each in found]), origins)
    assert run.predict(autoencoder, dm, return_predictions=False) is None


def test_predictions_of_a_grid_have_the_names_of_its_saes(tiny: Callable[[str], str], tmp_path: Path) -> None:
    dm = data(tiny("gpt2"))
    grid = SparseAutoencoderGrid(dm.d_in, {"k": [2, 4]}, {"d_sae": 64})
    found = trainer(tmp_path).predict(grid, dm)
    assert found is not None
    assert list(found[0]) == ["k=2", "k=4"]
    assert all(isinstance(each, SparseLatents) for each in found[0].values())
    assert int(torch.bincount(found[0]["k=2"].rows).max()) <= 2


@pytest.mark.parametrize("architecture", EVERY)
def test_a_few_rows_are_encoded_at_a_time_with_the_same_latents(
    monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    autoencoder = SparseAutoencoder(8, 512, k=4, architecture=architecture)
    x = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    autoencoder.prepare(None)
    autoencoder.initialize_from(x)
    whole, _ = active_latents(autoencoder, x, None)
    monkeypatch.setattr(forward, "CHUNK_BYTES", 128 * 4 * 512)
    monkeypatch.setattr(sparse, "ENCODE_CHUNK_BYTES", 128 * 4 * 512)
    with Largest() as largest:
        parts, _ = active_latents(autoencoder, x, None)
    entries = 8 * len(whole.rows)  # int64 of a chunk, or int32 and float32 of all
    assert largest.bytes <= max(2 * 128 * 4 * 512, entries)
    torch.testing.assert_close(whole.dense(), autoencoder.encode_served(x).detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts.dense(), whole.dense(), rtol=1e-5, atol=1e-6)
    key = parts.rows.long() * 512 + parts.latents
    assert (key[1:] > key[:-1]).all(), "not sorted by row and latent"


def test_rows_with_nan_stop_a_prediction_or_have_no_latents(tmp_path: Path) -> None:
    rows = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    rows[5, 3], rows[9, 0] = torch.nan, torch.inf
    served = Rows([], [])
    served.predict_dataloader = lambda: DataLoader([rows], batch_size=None)  # type: ignore[method-assign]
    with pytest.raises(NonFiniteRowsError, match="2 of 64 predicted rows hold NaN or infinity"):
        trainer(tmp_path).predict(SparseAutoencoder(16, 64, k=4), served)
    found = trainer(tmp_path).predict(SparseAutoencoder(16, 64, k=4, on_nonfinite="skip"), served)
    assert found is not None
    assert set(range(64)) - set(found[0].rows.tolist()) == {5, 9}


MEASURE = """
import re, sys
from pathlib import Path
import lightning, torch
from deeplens_lightning.callbacks import LatentPredictionWriter
from deeplens_lightning.datamodule import ActivationDataModule
from deeplens_lightning.sae import SparseAutoencoder

ROWS = 200_000

def megabytes(name):
    return int(re.search(rf"{name}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

if __name__ == "__main__":
    cache, out = sys.argv[1:]
    torch.set_num_threads(1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before = megabytes("VmRSS")
    data = ActivationDataModule(shards=cache, hook="rows", val_fraction=0.99, val_rows=ROWS, batch_size=4096)
    sae = SparseAutoencoder(data.d_in, 65_536, k=32)
    run = lightning.Trainer(
        accelerator="cpu", callbacks=LatentPredictionWriter(out), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )
    found = run.predict(sae, data)
    assert sum(each.shape[0] for each in found) == ROWS
    assert sum(len(each.rows) for each in found) > 16 * ROWS
    print(megabytes("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the memory from /proc")
def test_predicting_200000_rows_of_65536_latents_takes_less_than_1_gb(tmp_path: Path) -> None:
    cache = tmp_path / "rows.pt"
    torch.save(torch.randn(204_000, 32, generator=torch.Generator().manual_seed(0)), cache)
    command = [sys.executable, "-c", MEASURE, str(cache), str(tmp_path / "latents")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 1000
