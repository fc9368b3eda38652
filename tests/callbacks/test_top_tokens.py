"""The rows with the largest activations are kept, and their text is that of their documents."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import lightning as L
import pytest
import torch
from transformers import AutoTokenizer

from deeplens_lightning.callbacks import TopActivatingTokens
from deeplens_lightning.callbacks.top_rows import TopRows
from deeplens_lightning.datamodule import ActivationDataModule
from deeplens_lightning.reporting.readable_tokens import token_strings
from deeplens_lightning.sae import SparseAutoencoder
from deeplens_lightning.types import Provenance
from tests.support.training import trainer


def _read(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "run" / "top_tokens" / "latents.json").read_text())  # type: ignore[no-any-return]


def test_contexts_show_the_text_of_a_row_and_the_latents_activations_on_it(
    fit: Callable[..., Any], texts: list[str], tmp_path: Path, lm_folder: str
) -> None:
    run = fit([TopActivatingTokens(latents=range(256), keep=4, every_n_steps=1)])
    rows = torch.cat(run.batches)
    with torch.no_grad():
        z = run.sae.eval().encode(rows)
    where = {(d, p): i for i, (_, d, p, _) in enumerate(run.provenance.tolist())}
    tokenizer = AutoTokenizer.from_pretrained(lm_folder)
    found = _read(tmp_path)
    assert found["rows"] == len(rows) == 24 * 64
    assert [entry["latent"] for entry in found["latents"]] == list(range(256))
    filled = 0
    for entry in found["latents"]:
        values = [context["value"] for context in entry["contexts"]]
        assert values == sorted(values, reverse=True)
        places = [(context["document"], context["position"]) for context in entry["contexts"]]
        assert len(set(places)) == len(places)
        filled += bool(values)
        for context, place in zip(entry["contexts"], places, strict=True):
            document = tokenizer(texts[place[0]])["input_ids"]
            start = place[1] - context["peak"]
            shown = token_strings(tokenizer, document[start : start + len(context["tokens"])])
            assert context["tokens"] == shown
            assert context["value"] == pytest.approx(float(z[where[place], entry["latent"]]), rel=1e-3)
            assert context["values"][context["peak"]] == context["value"]
            assert None not in context["values"]
    assert filled > 100


def test_random_latents_are_seeded_and_chosen_ones_are_kept(fit: Callable[..., Any], tmp_path: Path) -> None:
    fit([TopActivatingTokens(latents=5, every_n_steps=4)])
    first = [entry["latent"] for entry in _read(tmp_path)["latents"]]
    fit([TopActivatingTokens(latents=5, every_n_steps=4)])
    assert [entry["latent"] for entry in _read(tmp_path)["latents"]] == first
    fit([TopActivatingTokens(latents=[7, 3], every_n_steps=4)])
    assert [entry["latent"] for entry in _read(tmp_path)["latents"]] == [7, 3]
    with pytest.raises(ValueError, match=r"latents=\[256\] do not exist: this SAE has latents 0 to 255"):
        fit([TopActivatingTokens(latents=[1, 256], every_n_steps=4)])


def test_validate_finds_the_strongest_held_out_rows_of_a_checkpoint(
    fit: Callable[..., Any], live: Callable[..., Any], tmp_path: Path, lm_folder: str, texts: list[str]
) -> None:
    trained = fit([], max_epochs=1)
    path = tmp_path / "one.ckpt"
    trained.trainer.save_checkpoint(path)
    data, callback = live(), TopActivatingTokens(latents=range(256), keep=3)
    fresh = trainer(tmp_path / "run", callbacks=[callback])
    fresh.validate(
        SparseAutoencoder(d_in=data.d_in, d_sae=256, k=8), data, ckpt_path=str(path), verbose=False
    )
    found = _read(tmp_path)
    data.setup("validate")
    rows, places = [], []
    for batch in data.val_dataloader():
        known = data.provenance(batch)
        assert known is not None
        rows.append(batch)
        places += zip(known.document_index.tolist(), known.position.tolist(), strict=True)
    with torch.no_grad():
        z = trained.sae.eval().encode(torch.cat(rows))
    assert found["rows"] == len(places) == 128
    for entry in found["latents"]:
        own = z[:, entry["latent"]]
        assert entry["frequency"] == pytest.approx(float((own > 0).float().mean()))
        values = [context["value"] for context in entry["contexts"]]
        assert values == pytest.approx(sorted(own[own > 0].tolist(), reverse=True)[:3], rel=1e-3)
        for context in entry["contexts"]:
            at = places.index((context["document"], context["position"]))
            assert context["value"] == pytest.approx(float(own[at]), rel=1e-3)
    assert callback.written == [tmp_path / "run" / "top_tokens" / "latents.json"]


def test_without_a_model_only_the_token_itself_has_a_value(
    fit: Callable[..., Any], shards: Callable[[], Any], tmp_path: Path
) -> None:
    fit([TopActivatingTokens(latents=64, every_n_steps=2)], datamodule=shards())
    contexts = [context for entry in _read(tmp_path)["latents"] for context in entry["contexts"]]
    assert contexts
    for context in contexts:
        assert [i for i, value in enumerate(context["values"]) if value is not None] == [context["peak"]]


def test_without_the_documents_text_only_the_token_is_shown(
    fit: Callable[..., Any], live: Callable[..., Any], texts: list[str], tmp_path: Path
) -> None:
    stream = datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset()
    fit([TopActivatingTokens(latents=64, every_n_steps=2)], datamodule=live(dataset_name=stream))
    contexts = [context for entry in _read(tmp_path)["latents"] for context in entry["contexts"]]
    assert contexts
    assert {len(context["tokens"]) for context in contexts} == {1}


class _Anonymous(L.LightningDataModule):
    """A data module without provenance."""

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.randn(64, 128), batch_size=8)


def test_a_datamodule_without_provenance_is_refused(lm_folder: str, tmp_path: Path) -> None:
    trainer = L.Trainer(
        accelerator="cpu", logger=False, default_root_dir=tmp_path, callbacks=[TopActivatingTokens()]
    )
    with pytest.raises(ValueError, match=r"says where rows came from"):
        trainer.fit(SparseAutoencoder(128, 256, k=8), _Anonymous())


class _Replacing(ActivationDataModule):
    """A data module that changes the rows of each batch, and loses their provenance."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch + 0.0


class _Anywhere(ActivationDataModule):
    """A data module that does not know the tokens of its rows, as with shards that hold bare tensors."""

    def provenance(self, batch: Any) -> Any:
        unknown = torch.full((len(batch),), -1)
        return Provenance(unknown, unknown, unknown, unknown)


def test_rows_of_unknown_place_are_left_out_and_the_reason_is_said(
    fit: Callable[..., Any], live: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level("INFO"),
        pytest.warns(UserWarning, match="does not recognise a batch that other code"),
    ):
        fit([TopActivatingTokens(every_n_steps=1)], datamodule=live(kind=_Replacing), record=False)
    with caplog.at_level("INFO"):
        fit([TopActivatingTokens(every_n_steps=1)], datamodule=live(kind=_Anywhere))
    reasons = [message for message in caplog.messages if "no rows to show" in message]
    assert "their provenance is unknown" in reasons[0]
    assert "the data have no token ids" in reasons[1]
    assert not (tmp_path / "run" / "top_tokens").exists()


def test_batches_and_weights_are_bit_identical_with_and_without_it(
    fit: Callable[..., Any], undisturbed: Callable[..., None]
) -> None:
    undisturbed(fit([]), fit([TopActivatingTokens(every_n_steps=1)]))


def test_merging_equals_sorting_everything_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(100, 6, generator=generator)
    provenance = torch.stack([torch.arange(100)] * 4, dim=1)
    top = TopRows(torch.tensor([1, 4]), keep=5)
    for start in range(0, 100, 7):  # the last batch is smaller than keep
        part = slice(start, start + 7)
        top.add({"h": rows[part]}, rows[part][:, [1, 4]], provenance[part])
    top.add({"h": rows[:7]}, rows[:7][:, [1, 4]], provenance[:7])  # served again
    want, index = rows[:, [1, 4]].T.topk(5)
    assert torch.equal(top.values, want)
    assert torch.equal(top.provenance[:, :, 0], index)
    assert torch.equal(top.rows["h"], rows[index])
    top.refresh(lambda x: [-part + 1 for part in x["h"].split(3)])
    want, order = (1 - want).sort(descending=True)
    assert torch.equal(top.values, want)
    assert torch.equal(top.provenance[:, :, 0], index.gather(1, order))


def test_rows_on_which_a_latent_does_not_fire_are_never_contexts() -> None:
    top = TopRows(torch.tensor([0]), keep=3)
    rows = torch.tensor([[0.0], [2.0], [-1.0]])
    top.add({"h": rows}, rows, torch.arange(12).reshape(3, 4))
    assert (top.values > 0).sum() == 1
    assert top.fired.tolist() == [1]


def test_values_outside_their_range_are_refused() -> None:
    for arguments in ({"latents": 0}, {"keep": 0}, {"latents": []}, {"before": -1}):
        with pytest.raises(ValueError, match="="):
            TopActivatingTokens(**arguments)  # type: ignore[arg-type]


def test_a_fit_that_is_too_short_says_so(
    fit: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback: L.Callback = TopActivatingTokens(every_n_steps=1000)
    with caplog.at_level("INFO"):
        fit([callback])
    assert any("ended at step 24, before every_n_steps=1000" in message for message in caplog.messages)
    assert not (tmp_path / "run" / "top_tokens").exists()


def test_validate_searches_the_held_out_rows(live: Callable[..., Any], tmp_path: Path) -> None:
    dm = live()
    sae = SparseAutoencoder(d_in=dm.d_in, d_sae=256, k=8)
    top = TopActivatingTokens(latents=range(256), keep=2)
    trainer(tmp_path / "run", None, [top]).validate(sae, dm, verbose=False)
    found = _read(tmp_path)
    dm.setup("validate")
    with torch.no_grad():
        z = sae.eval().encode(torch.cat(list(dm.val_dataloader())))
    assert found["rows"] == len(z) == 128
    for entry in found["latents"]:
        top_value = float(z[:, entry["latent"]].max())
        values = [context["value"] for context in entry["contexts"]]
        assert values[:1] == pytest.approx([top_value] if top_value > 0 else [], rel=1e-3)
