"""`ActivationDataModule` with every family of models, by name and loaded, and the errors for wrong settings."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from deeplens_lightning import ActivationDataModule, SparseAutoencoder
from deeplens_lightning.model.inspection import inspect_model
from deeplens_lightning.model.isolation import relative_error
from deeplens_lightning.options import ModelOptions, TextOptions
from tests.model.test_frozen import reference, snapshot
from tests.support.model_families import FAMILIES, randomised, tiny_config, tiny_model
from tests.support.texts import texts
from tests.support.training import trainer

SEGMENT = 24
GENERATOR = torch.Generator().manual_seed(0)
IDS = [
    torch.randint(3, 97, (length,), generator=GENERATOR).tolist()
    for length in (5, 24, 11, 24, 30, 2, 17, 61, 9)
]


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_every_kind_and_family_equal_the_untouched_model_after_the_whole_stream(name: str) -> None:
    kinds = list(FAMILIES[name].places(1))
    names = {kind: kind if kind == "final_norm" else f"layers.1.{kind}" for kind in kinds}
    data = ActivationDataModule(
        tiny_model(name),
        layer=1,
        hook=kinds,
        dataset_name=datasets.Dataset.from_dict({"ids": IDS}),
        text_column="ids",
        seq_length=SEGMENT,
        inference_batch_size=2,
        batch_size=16,
        buffer_size=64,
        val_fraction=0,
        device="cpu",
    )
    data.setup("fit")
    offered = {
        offer.name: offer.d_in
        for offer in inspect_model(tiny_model(name)).offers
        if not offer.layers or 1 in offer.layers
    }
    assert data.d_in == {
        names[kind]: offered[names[kind].replace("layers.1.", "layers.<i>.")] for kind in kinds
    }
    wanted: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
    for document, ids in enumerate(IDS):
        for begin in range(0, len(ids), SEGMENT):
            rows = reference(name, torch.tensor(ids[begin : begin + SEGMENT]))
            for n in range(len(ids[begin : begin + SEGMENT])):
                wanted[document, begin + n] = {kind: rows[kind][0, n] for kind in kinds}
    served = 0
    for batch in data.train_dataloader():
        where = data.provenance(batch)
        assert where is not None
        keys = list(zip(where.document_index.tolist(), where.position.tolist(), strict=True))
        for kind in kinds:
            rows = torch.stack([wanted[key][kind] for key in keys])
            assert relative_error(batch[names[kind]], rows).max() < 1e-5
        served += len(keys)
    assert served == len(wanted) == sum(map(len, IDS))
    data.teardown("fit")


def test_a_loaded_model_is_byte_for_byte_unchanged_after_fit(
    tiny: Callable[[str], str], tmp_path: Path
) -> None:
    folder = tiny("llama")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.model.layers[1].train()
    before, config = snapshot(model), copy.deepcopy(model.config.to_dict())
    data = ActivationDataModule(
        model,
        layer=1,
        hook="mlp_out",
        dataset_name=texts(40),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        seq_length=32,
        batch_size=64,
        buffer_size=256,
        val_rows=100,
        val_fraction=0.2,
    )
    assert isinstance(data.d_in, int)
    sae = SparseAutoencoder(data.d_in, d_sae=64, k=4)
    trainer(tmp_path, max_steps=5).fit(sae, data)
    after = snapshot(model)
    weights, weights_after = before.pop("weights"), after.pop("weights")
    assert before == after
    assert weights.keys() == weights_after.keys()  # type: ignore[attr-defined]
    assert all(torch.equal(x, weights_after[key]) for key, x in weights.items())  # type: ignore[attr-defined,index]
    assert model.config.to_dict() == config
    assert not any("model" in name for name, _ in sae.named_parameters())


def test_d_in_that_contradicts_the_data_is_refused_before_training(
    tiny: Callable[[str], str], tmp_path: Path
) -> None:
    data = ActivationDataModule(
        tiny("llama"), layer=1, hook="mlp_out", dataset_name=texts(40), seq_length=32, batch_size=64
    )
    with pytest.raises(ValueError, match=r"d_in=32.*99"):
        trainer(tmp_path, max_steps=5).fit(SparseAutoencoder(99, d_sae=64, k=4), data)


def test_d_in_is_known_before_weights_are_loaded(
    tiny: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoModel, "from_pretrained", refuse)
    assert ActivationDataModule(tiny("gpt2"), layer=-1, hook="mlp_act").d_in == 128
    assert ActivationDataModule(tiny("gpt2"), layer=[0, 1], hook="blocks.0.hook_mlp_out").hook_names == (
        "layers.0.mlp_out",
    )


def test_documents_that_are_not_isolated_see_each_other(tiny: Callable[[str], str]) -> None:
    rows = {}
    for isolate in (True, False):
        data = ActivationDataModule(
            tiny("gpt2"),
            layer=2,
            hook="resid_post",
            dataset_name=texts(30),
            seq_length=64,
            batch_size=32,
            val_fraction=0,
            model_options=ModelOptions(isolation="auto" if isolate else "none"),
            device="cpu",
        )
        data.setup("fit")
        rows[isolate] = {
            key: row
            for batch in data.train_dataloader()
            for where in [data.provenance(batch)]
            if where is not None
            for key, row in zip(
                zip(where.document_index.tolist(), where.position.tolist(), strict=True), batch, strict=True
            )
        }
        data.teardown("fit")
    assert rows[True].keys() == rows[False].keys()
    differs = [not torch.allclose(rows[True][key], rows[False][key], atol=1e-3) for key in rows[True]]
    assert sum(differs) / len(differs) > 0.05


def test_special_tokens_are_context_and_do_not_become_rows(tiny: Callable[[str], str]) -> None:
    counts = {}
    for keep in (True, False):
        data = ActivationDataModule(
            tiny("llama"),
            layer=1,
            hook="mlp_out",
            dataset_name=texts(30),
            seq_length=32,
            batch_size=64,
            val_fraction=0,
            text_options=TextOptions(prepend_bos=True),
            exclude_special_tokens=not keep,
            device="cpu",
        )
        data.setup("fit")
        tokens = torch.cat([data.provenance(batch).token_id.clone() for batch in data.train_dataloader()])  # type: ignore[union-attr]
        counts[keep] = int((tokens == 0).sum())
        data.teardown("fit")
    assert counts[False] == 0
    assert counts[True] > 30


def test_a_rope_that_scales_by_length_is_served_as_each_segment_alone() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    config = tiny_config("llama", rope_parameters=rope, max_position_embeddings=16)
    model = randomised(AutoModel.from_config(config))
    ids = [list(range(3, 3 + n)) for n in (4, 40, 12, 33, 9, 16, 17)]
    data = ActivationDataModule(
        model,
        layer=1,
        hook="mlp_out",
        dataset_name=datasets.Dataset.from_dict({"ids": ids}),
        text_column="ids",
        seq_length=48,
        batch_size=8,
        val_fraction=0,
        device="cpu",
    )
    data.setup("fit")
    assert data.model is not None
    assert data.model.isolation == "equal"
    found = 0
    for batch in data.train_dataloader():
        where = data.provenance(batch)
        assert where is not None
        for row, document, position in zip(
            batch, where.document_index.tolist(), where.position.tolist(), strict=True
        ):
            alone = data.model.activations(torch.tensor([ids[document]]))["layers.1.mlp_out"][0, position]
            assert relative_error(row[None], alone[None]).max() < 1e-5
            found += 1
    assert found == sum(map(len, ids))
    data.teardown("fit")
