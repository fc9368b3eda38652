"""Settings that cannot work, or that the chosen source of rows does not use, are refused before anything is loaded."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from deeplens_lightning import ActivationDataModule
from deeplens_lightning.options import BufferOptions, CacheOptions, ModelOptions, TextOptions
from deeplens_lightning.stream.settings import DataSettings

LIVE_ONLY: dict[str, Any] = {
    "dataset_name": "texts.jsonl",
    "text_column": "body",
    "dataset_split": "test",
    "write_shards": "cache",
    "tokenizer": "gpt2",
    "seq_length": 64,
    "inference_batch_size": 4,
    "buffer_size": 100_000,
    "exclude_special_tokens": False,
    "text_options": TextOptions(drop_first_n=1),
    "model_options": ModelOptions(compile=True),
    "buffer_options": BufferOptions(max_norm_ratio=3.0),
}


@pytest.mark.parametrize("name", LIVE_ONLY)
def test_settings_that_shards_do_not_use_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}.* would have no effect"):
        ActivationDataModule(shards="acts", **{name: LIVE_ONLY[name]})


def test_cache_settings_without_a_cache_are_refused_and_with_one_they_are_not() -> None:
    with pytest.raises(ValueError, match=r"cache_options\.shuffle would have no effect"):
        ActivationDataModule(cache_options=CacheOptions(shuffle="window"))
    ActivationDataModule(cache_options=CacheOptions(shuffle="window"), write_shards="cache")
    ActivationDataModule(cache_options=CacheOptions(shuffle="window"), shards="acts")


def test_settings_at_their_defaults_are_never_refused() -> None:
    defaults = {field.name: field.default for field in fields(DataSettings)}
    ActivationDataModule(**defaults)  # type: ignore[arg-type]
    ActivationDataModule(**{**defaults, "shards": "acts"})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"buffer_size": 10, "batch_size": 64}, "is below batch_size=64"),
        ({"buffer_size": "big"}, "must be a number of rows"),
        ({"inference_batch_size": "big"}, "must be a number of blocks"),
        ({"inference_batch_size": 0}, "inference_batch_size=0 must be at least 1"),
        ({"buffer_options": BufferOptions(val_bytes=0)}, "val_bytes=0 must be at least 1"),
        ({"max_tokens": 10}, "an epoch would have no batch"),
        ({"val_fraction": 1.0}, "must be at least 0 and below 1"),
        ({"normalize": "unit"}, "choose one of none, mean_norm"),
    ],
)
def test_values_that_cannot_work_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ActivationDataModule(**settings)


def test_the_signature_and_the_docs_are_those_of_the_settings() -> None:
    shown = inspect.signature(ActivationDataModule).parameters
    assert list(shown) == [field.name for field in fields(DataSettings)]
    assert shown["seq_length"].default == 128
    documented = inspect.getdoc(ActivationDataModule.__init__)
    assert documented is not None
    assert all(f"{name}: " in documented for name in shown)
    with pytest.raises(TypeError, match="hf_modell"):
        ActivationDataModule(hf_modell="gpt2")  # type: ignore[call-arg]


def test_layer_and_hook_name_a_bare_tensor(tmp_path: Path) -> None:
    torch.save(torch.randn(100, 8), tmp_path / "rows.pt")
    torch.save(torch.randn(100, 8), tmp_path / "features_layer_2_100.pt")
    bare = str(tmp_path / "rows.pt")
    assert ActivationDataModule(shards=bare).hook_names == ()
    assert ActivationDataModule(shards=bare).hf_model is None
    named = ActivationDataModule("gpt2", 5, "mlp_out", shards=bare)
    assert (named.hook_names, named.hf_model) == (("layers.5.mlp_out",), "gpt2")
    assert ActivationDataModule(shards=bare, hook="blocks.5.hook_mlp_out").hook_names == ("layers.5.mlp_out",)
    theirs = str(tmp_path / "features_layer_2_100.pt")
    assert ActivationDataModule(shards=theirs).hook_names == ("layers.2.mlp_act",)


def test_a_list_of_paths_is_recorded_as_paths_and_one_of_texts_as_texts() -> None:
    paths = ActivationDataModule(dataset_name=["a.jsonl", "b.jsonl"])
    assert paths.hparams["data"]["dataset_name"] == ["a.jsonl", "b.jsonl"]
    assert ActivationDataModule(dataset_name=["a", "b"]).hparams["data"]["dataset_name"] == "list of 2 texts"
    with pytest.raises(ValueError, match="is a path, and 'a text' is not"):
        ActivationDataModule(dataset_name=["a.jsonl", "a text"])


def test_a_data_module_is_not_loaded_from_a_checkpoint_but_continued_by_the_trainer() -> None:
    with pytest.raises(
        NotImplementedError, match=r"ActivationDataModule\(\.\.\.\) .* ckpt_path='runs/last.ckpt'\)"
    ):
        ActivationDataModule.load_from_checkpoint("runs/last.ckpt", batch_size=64)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("batchsize", "did you mean batch_size=...?"),
        ("drop_first_n", "did you mean text_options=TextOptions(drop_first_n=...)?"),
        ("max_norm_ration", "did you mean buffer_options=BufferOptions(max_norm_ratio=...)?"),
        ("zzz", "help(ActivationDataModule.__init__) lists them"),
    ],
)
def test_an_unknown_argument_names_the_nearest_one_and_its_group(name: str, hint: str) -> None:
    with pytest.raises(TypeError) as error:
        ActivationDataModule(**{name: 3})  # type: ignore[arg-type]
    assert str(error.value) == f"ActivationDataModule has no argument {name!r}; {hint}"
