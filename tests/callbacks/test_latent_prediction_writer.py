"""Files of predicted latents hold what `predict` returns, are whole or absent, and are written by each rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pyarrow.parquet as pq
import pytest
import torch

from deeplens_lightning.callbacks import LatentPredictionWriter, latent_prediction_writer
from deeplens_lightning.sae import SparseAutoencoderGrid
from deeplens_lightning.types import PROVENANCE
from tests.support.ranks import launch
from tests.support.training import data, sae, trainer


def lines(path: Path) -> list[tuple[Any, ...]]:
    return [tuple(line.values()) for line in pq.read_table(path).to_pylist()]


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("group", [2**19, 100])
def test_a_file_has_one_line_for_each_active_latent(
    group: int, tiny: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent_prediction_writer, "GROUP", group)
    dm, folder = data(tiny("gpt2"), val_rows=100), tmp_path / "latents"
    autoencoder, run = sae(dm), trainer(tmp_path, None, [LatentPredictionWriter(folder)])
    found = run.predict(autoencoder, dm)
    assert found is not None
    expected, first = [], 0
    for each in found:
        origins = each.provenance.stacked()
        for row, latent, value in zip(each.rows, each.latents, each.values, strict=True):
            expected.append((first + int(row), int(latent), float(value), *origins[row].tolist()))
        first += each.shape[0]
    assert files(folder) == ["rank00000.parquet"]
    assert lines(folder / "rank00000.parquet") == expected
    file = pq.ParquetFile(folder / "rank00000.parquet")
    assert file.schema_arrow.names == ["row", "latent", "value", *PROVENANCE]
    assert file.metadata.metadata[b"rows"] == b"100"
    assert file.metadata.metadata[b"d_sae"] == b"64"
    assert (file.num_row_groups > 1) == (group < len(expected))


def test_each_sae_of_a_grid_has_a_folder(tiny: Callable[[str], str], tmp_path: Path) -> None:
    dm = data(tiny("gpt2"))
    grid = SparseAutoencoderGrid(dm.d_in, {"k": [2, 4]}, {"d_sae": 64})
    writer = LatentPredictionWriter(tmp_path / "latents")
    trainer(tmp_path, None, [writer]).predict(grid, dm, return_predictions=False)
    assert files(tmp_path / "latents") == ["k=2/rank00000.parquet", "k=4/rank00000.parquet"]


class Failing(L.Callback):
    def on_predict_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if batch_idx == 2:
            raise RuntimeError("in the middle")


def test_an_interrupted_prediction_leaves_no_file(tiny: Callable[[str], str], tmp_path: Path) -> None:
    dm, folder = data(tiny("gpt2")), tmp_path / "latents"
    with pytest.raises(RuntimeError, match="in the middle"):
        trainer(tmp_path, None, [LatentPredictionWriter(folder), Failing()]).predict(sae(dm), dm)
    assert files(folder) == []
    trainer(tmp_path, None, [LatentPredictionWriter(folder)]).predict(sae(dm), dm)
    assert files(folder) == ["rank00000.parquet"]


def test_files_of_an_earlier_prediction_are_not_mixed_with_new_ones(
    tiny: Callable[[str], str], tmp_path: Path
) -> None:
    dm = data(tiny("gpt2"))
    (tmp_path / "rank00001.parquet").touch()
    with pytest.raises(FileExistsError, match=r"contains rank00001\.parquet: delete the files"):
        trainer(tmp_path, None, [LatentPredictionWriter(tmp_path)]).predict(sae(dm), dm)


def test_a_module_that_returns_something_else_is_named(tiny: Callable[[str], str], tmp_path: Path) -> None:
    class Other(L.LightningModule):
        def predict_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return batch

    with pytest.raises(TypeError, match="predict_step of Other returned Tensor"):
        trainer(tmp_path, None, [LatentPredictionWriter(tmp_path / "a")]).predict(Other(), data(tiny("gpt2")))
    assert files(tmp_path / "a") == []


def _predict(rank: int, ranks: int, model: str, folder: Path) -> None:
    dm = data(model, val_rows=101)
    run = trainer(folder, None, [LatentPredictionWriter(folder / "latents")], devices=ranks, strategy="ddp")
    run.predict(sae(dm), dm, return_predictions=False)


@pytest.mark.slow
def test_ranks_write_files_of_their_own_with_all_rows_together(
    tiny: Callable[[str], str], tmp_path: Path
) -> None:
    launch(2, _predict, tiny("gpt2"), tmp_path)
    names = ["rank00000.parquet", "rank00001.parquet"]
    assert files(tmp_path / "latents") == names
    dm = data(tiny("gpt2"), val_rows=101)
    trainer(tmp_path, None, [LatentPredictionWriter(tmp_path / "one")]).predict(sae(dm), dm)

    def found(path: Path) -> set[tuple[Any, ...]]:
        return {(line[1], round(line[2], 3), *line[3:]) for line in lines(path)}  # rows have other numbers

    parts = [found(tmp_path / "latents" / name) for name in names]
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == found(tmp_path / "one" / names[0])
