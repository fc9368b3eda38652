"""A folder that is removed, emptied or replaced while rows are written to it is noticed at the next shard."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from deeplens_lightning.cli.newest_checkpoint import newest_checkpoint
from deeplens_lightning.disk.files import watch
from deeplens_lightning.extraction.predict import run
from deeplens_lightning.shards import FolderLostError, ShardError, ShardWriter, folder, verify
from deeplens_lightning.shards.names import MANIFEST, shard_name, sidecar_name
from tests.support.caches import feed, make_rows, manifest, read_back, write_cache
from tests.support.texts import texts
from tests.support.training import data, sae, trainer

SHARD = 300 * manifest().row_bytes


def replaced(folder: Path, **changes: object) -> None:
    shutil.move(folder, folder.parent / "moved")
    write_cache(folder, n=100, **changes)


LOSSES: dict[str, Callable[[Path], object]] = {
    "removed": shutil.rmtree,
    "moved": lambda folder: shutil.move(folder, folder.parent / "moved"),
    "emptied": lambda folder: [path.unlink() for path in folder.iterdir()],
    "without its manifest": lambda folder: (folder / MANIFEST).unlink(),
    "without a shard": lambda folder: (folder / shard_name(0, 1)).unlink(),
    "without a sidecar": lambda folder: (folder / sidecar_name(shard_name(0, 0))).unlink(),
    "replaced by the same cache": replaced,
    "replaced by another cache": lambda folder: replaced(folder, model={"name": "other"}),
    "replaced by a file": lambda folder: (shutil.rmtree(folder), folder.touch()),
}


@pytest.mark.parametrize(
    ("loss", "last"),
    [*((loss, False) for loss in LOSSES), ("removed", True), ("replaced by the same cache", True)],
)
def test_a_lost_folder_is_noticed_and_not_made_again(tmp_path: Path, loss: str, last: bool) -> None:
    folder = tmp_path / "parent" / "acts"
    rows, provenance = make_rows(1200)
    with ShardWriter(folder, manifest(), shard_bytes=SHARD) as writer:
        feed(writer, rows, provenance, stop=1200 if last else 900)
        writer.sync()
        LOSSES[loss](folder)
        left = content(folder)
        message = "was removed, emptied or replaced while rank 0 was writing to it"
        if not last:
            feed(writer, rows, provenance)
        with pytest.raises(FolderLostError, match=message):
            writer.finish()
    assert content(folder) == left


def content(folder: Path) -> list[str] | None:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else None


def test_an_extraction_stops_when_its_folder_is_gone_and_is_completed_by_the_same_command(
    tiny: Callable[[str], str], tmp_path: Path
) -> None:
    def extract(folder: Path) -> None:
        dm = data(tiny("gpt2"), texts(20), val_fraction=0.0, val_rows=0)
        run(dm, str(folder), shard_bytes=100_000, accelerator="cpu")

    def remove(step: str, path: str) -> None:
        if step == "create" and path.endswith("000003.pt"):
            shutil.rmtree(gone)

    whole, gone = tmp_path / "whole", tmp_path / "gone"
    extract(whole)
    watch(remove)
    try:
        with pytest.raises(FolderLostError, match=r"3 finished shard\(s\) .* run the same command again"):
            extract(gone)
    finally:
        watch(None)
    assert not gone.exists()
    extract(gone)
    assert verify(gone).problems == []
    (rows, provenance), (expected, where) = read_back(gone), read_back(whole)
    assert torch.equal(provenance, where)
    assert all(torch.equal(rows[name], expected[name]) for name in expected)


class RemoveAt(L.Callback):
    """Remove a folder after some step."""

    def __init__(self, folder: Path, step: int) -> None:
        self.folder, self.step = folder, step

    def on_train_batch_end(self, trainer: L.Trainer, *_: object, **__: object) -> None:
        if trainer.global_step == self.step:
            shutil.rmtree(self.folder)


def test_a_training_whose_cache_is_gone_continues_from_its_checkpoint_without_it(
    tiny: Callable[[str], str], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"

    def fit(
        folder: str, *, steps: int = 30, write: bool, ckpt: Path | None = None, remove: bool = False
    ) -> Any:
        dm = data(tiny("gpt2"), write_shards=str(cache) if write else None)
        saving = ModelCheckpoint(tmp_path / folder, every_n_train_steps=5, save_last=True)
        callbacks = [*([RemoveAt(cache, 12)] if remove else []), saving]
        module = sae(dm)
        trainer(tmp_path, callbacks=callbacks, max_steps=steps, limit_val_batches=0).fit(
            module, dm, ckpt_path=ckpt
        )
        return module.state_dict()

    expected = fit("plain", write=False)
    with pytest.raises(
        FolderLostError, match="a training continues from its last checkpoint without write_shards"
    ):
        fit("lost", write=True, remove=True)
    assert not cache.exists()
    last = newest_checkpoint(tmp_path / "lost")
    assert last is not None
    assert torch.load(last, weights_only=True)["global_step"] == 10
    found = fit("lost", write=False, ckpt=last)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    sentence = r"a training that continues after them does not compute them again: continue without write_shards \(--data"
    with pytest.raises(ShardError, match=sentence):
        fit("lost", write=True, ckpt=last)
    found = fit("anew", write=True)  # the other way that the sentence names, in the folder as it is now
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert verify(cache).problems == []


def test_a_file_that_another_rank_deletes_while_the_folder_is_listed_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kept").write_text("four")
    (tmp_path / "deleted").touch()

    def is_file(entry: os.DirEntry[str]) -> bool:
        if entry.name == "deleted":
            Path(entry.path).unlink()
        return True

    monkeypatch.setattr(folder, "_is_file", is_file)
    assert folder.LocalFolder(tmp_path).sizes() == {"kept": 4}
