"""Checkpoints with changed bytes are refused in one sentence wherever this package is part of reading them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from deeplens_lightning.cli.main import main
from deeplens_lightning.disk.torch_files import DamagedFileError, check_checkpoint_file
from deeplens_lightning.sae import SparseAutoencoder
from deeplens_lightning.sae.grid import SparseAutoencoderGrid
from tests.support.training import data, sae, trainer

SENTENCE = (
    r"flipped\.ckpt is damaged: Bad CRC-32 .*\. Copy it again, or take another one: --ckpt_path newest:FOLDER"
)


class OwnModule(L.LightningModule):
    """A module that has nothing of this package."""

    def __init__(self, d_in: int = 64) -> None:
        super().__init__()
        self.mean = torch.nn.Parameter(torch.randn(d_in))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return ((batch - self.mean) ** 2).mean()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def flipped(path: Path, weights: torch.Tensor) -> Path:
    """A copy of a checkpoint with one bit of these weights flipped, which `torch.load` loads without an error."""
    content = bytearray(path.read_bytes())
    content[content.index(weights.detach().numpy().tobytes()) + 3] ^= 1
    other = path.with_name("flipped.ckpt")
    other.write_bytes(content)
    torch.load(other, weights_only=True)
    return other


def saved(folder: Path, module: L.LightningModule, dm: Any) -> Path:
    """The checkpoint of a fit of two steps."""
    run = trainer(folder, max_steps=2)
    run.fit(module, dm)
    run.save_checkpoint(folder / "whole.ckpt")
    return folder / "whole.ckpt"


def test_a_flipped_bit_of_a_checkpoint_is_refused_or_changes_nothing(
    tiny: Callable[[str], str], tmp_path: Path
) -> None:
    dm = data(tiny("gpt2"))
    module = sae(dm)
    content = saved(tmp_path, module, dm).read_bytes()
    generator, refused, path = random.Random(0), 0, tmp_path / "flipped.ckpt"
    for place in [0, 1, *generator.sample(range(len(content)), 80), len(content) - 1]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            found = SparseAutoencoder.load_from_checkpoint(path)
        except DamagedFileError as error:
            assert str(error).startswith(f"{path} is damaged: ")  # noqa: PT017
            refused += 1
        else:
            for name, value in module.state_dict().items():
                assert torch.equal(value, found.state_dict()[name]), (place, name)
    assert refused > 40


@pytest.mark.parametrize("method", ["fit", "validate"])
@pytest.mark.parametrize("own", [False, True])
def test_a_trainer_refuses_a_damaged_checkpoint_before_it_trains_or_validates(
    own: bool, method: str, tiny: Callable[[str], str], tmp_path: Path
) -> None:
    dm = data(tiny("gpt2"))
    assert isinstance(dm.d_in, int)
    module: Any = OwnModule(dm.d_in) if own else sae(dm)
    path = saved(tmp_path, module, dm)
    path = flipped(path, module.mean if own else module.W_enc)
    run = trainer(tmp_path, max_steps=4)
    with pytest.raises(ValueError, match=SENTENCE):
        getattr(run, method)(module, data(tiny("gpt2")), ckpt_path=str(path))


def test_a_grid_is_not_loaded_from_a_damaged_checkpoint(tiny: Callable[[str], str], tmp_path: Path) -> None:
    dm = data(tiny("gpt2"))
    grid = SparseAutoencoderGrid(dm.d_in, {"k": [2, 4]}, {"d_sae": 64})
    path = flipped(saved(tmp_path, grid, dm), next(iter(grid.dictionaries.values())).W_enc)
    with pytest.raises(ValueError, match=SENTENCE):
        SparseAutoencoderGrid.load_from_checkpoint(path)


@pytest.mark.slow
def test_the_command_line_refuses_a_damaged_checkpoint_before_it_loads_it(
    tiny: Callable[[str], str], tmp_path: Path
) -> None:
    path = tmp_path / "cut.ckpt"
    dm = data(tiny("gpt2"))
    path.write_bytes(saved(tmp_path, sae(dm), dm).read_bytes()[:-1000])
    words = [f"--data.hf_model={tiny('gpt2')}", "--data.layer=1", "--data.val_rows=64", "--model.d_sae=64"]
    words += ["--trainer.accelerator=cpu", "--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}"]
    with pytest.raises(SystemExit, match=rf"^error: {path} is damaged: File is not a zip file\. Copy it"):
        main(["validate", *words, f"--ckpt_path={path}"])


def test_files_without_crcs_are_left_to_torch(tmp_path: Path) -> None:
    check_checkpoint_file(None)
    check_checkpoint_file("s3://bucket/a.ckpt")
    check_checkpoint_file(tmp_path)
    torch.save({"a": torch.zeros(3)}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    check_checkpoint_file(tmp_path / "old.ckpt")
