"""`test` has documents of its own, which neither training nor validation serves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from deeplens_lightning.datamodule import ActivationDataModule
from deeplens_lightning.options import TextOptions
from deeplens_lightning.shards.rowset import in_split
from deeplens_lightning.stream.checkpoint import differences
from deeplens_lightning.text.documents import split_of
from tests.support.caches import NARROW, make_rows, write_cache
from tests.support.training import data, sae, trainer


def live(place: str, **changes: Any) -> ActivationDataModule:
    return data(place, val_rows=10_000, **changes)


def cached(place: str, **changes: Any) -> ActivationDataModule:
    settings = {"shards": place, "hook": NARROW, "batch_size": 16, "val_fraction": 0.2, "val_rows": 10_000}
    return ActivationDataModule(**(settings | changes))


@pytest.fixture(params=[live, cached])
def make(request: pytest.FixtureRequest, tiny: Callable[[str], str], tmp_path: Path) -> Callable[..., Any]:
    if request.param is live:
        return lambda **changes: live(tiny("gpt2"), **changes)
    write_cache(tmp_path / "cache")
    return lambda **changes: cached(str(tmp_path / "cache"), **changes)


def hashes(dm: ActivationDataModule, loader: Iterable[torch.Tensor]) -> set[int]:
    found: set[int] = set()
    for batch in loader:
        provenance = dm.provenance(batch)
        assert provenance is not None
        found |= set(provenance.document_hash.tolist())
    return found


def documents(dm: ActivationDataModule) -> dict[str, set[int]]:
    """The hashes of the documents of each split that a data module serves."""
    dm.setup("fit")
    loaders = {"train": dm.train_dataloader(), "heldout": dm.val_dataloader(), "test": dm.test_dataloader()}
    found = {split: hashes(dm, loader) for split, loader in loaders.items()}
    dm.teardown("fit")
    return found


def with_test(fraction: float) -> TextOptions:
    return TextOptions(test_fraction=fraction)


def test_train_validation_and_test_documents_are_disjoint_and_complete(make: Callable[..., Any]) -> None:
    split = documents(make(text_options=with_test(0.3)))
    without = documents(make())
    assert all(split.values())
    assert split["train"] | split["heldout"] | split["test"] == without["train"] | without["heldout"]
    assert not split["test"] & (split["train"] | split["heldout"])
    assert split["heldout"] == without["heldout"]
    assert {split_of(each, 0.2, 0.3) for each in split["test"]} == {"test"}
    assert documents(make(text_options=with_test(0.3), val_fraction=0.4))["test"] == split["test"]


def test_without_a_share_of_its_own_test_says_that_it_uses_the_validation_set(
    make: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    dm = make()
    dm.setup("test")
    with caplog.at_level(logging.INFO):
        served = [hashes(dm, loader) for loader in (dm.val_dataloader(), dm.test_dataloader())]
    dm.teardown("test")
    assert served[0] == served[1]
    assert caplog.text.count("test uses the validation set") == 1


def test_figures_of_a_test_are_those_of_the_test_documents(make: Callable[..., Any], tmp_path: Path) -> None:
    dm = make(text_options=with_test(0.3))
    autoencoder, run = sae(dm), trainer(tmp_path, max_steps=5)
    run.fit(autoencoder, dm)
    [validated] = run.validate(autoencoder, dm, verbose=False)
    [tested] = run.test(autoencoder, dm, verbose=False)
    dm.setup("test")
    x = torch.cat(list(dm.test_dataloader()))
    dm.teardown("test")
    with torch.no_grad():
        error = (x - autoencoder(x)).double().square().sum()
    expected = float(error / (x - x.double().mean(0)).square().sum())
    assert tested["test/rows"] == len(x)
    assert tested["test/fvu"] == pytest.approx(expected, rel=1e-5)
    assert validated["val/fvu"] != pytest.approx(expected, rel=1e-5)


def test_a_resume_with_another_share_is_refused(make: Callable[..., Any], tmp_path: Path) -> None:
    fingerprints = []
    for fraction in (0.0, 0.3):
        dm = make(text_options=with_test(fraction))
        dm.setup("fit")
        fingerprints.append(dm.serving.activations.fingerprint())
        dm.teardown("fit")
    old, new = fingerprints
    assert "test_fraction" not in old, "checkpoints of earlier releases have no such entry"
    assert [line.split(":")[0] for line in differences(old, new)] == ["test_fraction"]
    dm, keep = make(), ModelCheckpoint(tmp_path / "kept")
    trainer(tmp_path, None, [keep], max_steps=3).fit(sae(dm), dm)
    other = make(text_options=with_test(0.3))
    with pytest.raises(ValueError, match=r"test_fraction: \(nothing\) in the checkpoint, 0.3 now"):
        trainer(tmp_path, max_steps=6).fit(sae(other), other, ckpt_path=keep.best_model_path)


@pytest.mark.parametrize(("val", "test"), [(0.5, 0.5), (0.2, 0.9), (0.2, -0.1)])
def test_shares_that_leave_no_training_documents_are_refused(val: float, test: float) -> None:
    with pytest.raises(ValueError, match=r"test_fraction=.* must be at least 0, and below 1 together with"):
        ActivationDataModule(val_fraction=val, text_options=with_test(test))


def test_other_text_options_are_refused_with_shards(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^text_options.drop_first_n would have no effect"):
        cached(str(tmp_path), text_options=TextOptions(drop_first_n=1, test_fraction=0.1))


def test_live_and_cached_rows_are_split_by_the_same_rule() -> None:
    found = np.concatenate([make_rows(200_000)[1][:, 0].unique().numpy(), [-1, 0, 2**63 - 1, -(2**63)]])
    for val, test in ((0.0, 0.0), (0.05, 0.1), (0.2, 0.0), (0.3, 0.6), (0.0, 0.5)):
        live_rule = [split_of(each, val, test) for each in found.tolist()]
        for name, split in (("train", "train"), ("heldout", "val"), ("test", "test")):
            assert [each == name for each in live_rule] == in_split(found, val, test, split).tolist()
        assert live_rule.count("test") / len(found) == pytest.approx(test, abs=0.02)
