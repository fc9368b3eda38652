"""The strongest contexts are the strongest, and their text is where the row came from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from deeplens_lightning.callbacks import TopActivatingTokens
from deeplens_lightning.callbacks.strongest import Strongest
from deeplens_lightning.token_text import token_strings


def _read(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "run" / "top_tokens" / "latents.json").read_text())  # type: ignore[no-any-return]


def test_contexts_are_the_strongest_rows_of_all_training(fit: Callable[..., Any], tmp_path: Path) -> None:
    run = fit([TopActivatingTokens(latents=range(256), keep=4, every_n_steps=1)])
    dm = run.datamodule
    n = dm.n_batches * dm.batch_size
    with torch.no_grad():
        z = run.sae.eval().encode(dm._rows[:n])
    found = _read(tmp_path)
    assert found["rows"] == 2 * n
    assert [entry["latent"] for entry in found["latents"]] == list(range(256))
    compared = 0
    for entry in found["latents"]:
        values = [context["value"] for context in entry["contexts"]]
        assert values == sorted(values, reverse=True)
        places = [(context["document"], context["position"]) for context in entry["contexts"]]
        assert len(set(places)) == len(places)  # two epochs served each row twice
        if values:
            compared += 1
            # Early looks kept candidates by an untrained SAE; nothing beats the true strongest.
            assert values[0] <= float(z[:, entry["latent"]].max()) * (1 + 1e-3)
        for context in entry["contexts"]:
            document = dm.document_tokens(context["document"], _hash(dm, context["document"]))
            texts = token_strings(dm.tokenizer, document)
            start = context["position"] - context["peak"]
            assert context["tokens"] == texts[start : start + len(context["tokens"])]
            row = _row_of(dm, context["document"], context["position"])
            assert context["value"] == pytest.approx(float(z[row, entry["latent"]]), rel=1e-3)
            assert context["values"][context["peak"]] == context["value"]
            assert None not in context["values"]
    assert compared > 100


def _hash(dm: Any, document: int) -> int:
    return int(dm._provenance[dm._provenance[:, 1] == document][0, 0])


def _row_of(dm: Any, document: int, position: int) -> int:
    found = (dm._provenance[:, 1] == document) & (dm._provenance[:, 2] == position)
    return int(found.nonzero()[0])


def test_random_latents_are_seeded_and_chosen_ones_are_kept(fit: Callable[..., Any], tmp_path: Path) -> None:
    fit([TopActivatingTokens(latents=5, every_n_steps=4)])
    first = [entry["latent"] for entry in _read(tmp_path)["latents"]]
    fit([TopActivatingTokens(latents=5, every_n_steps=4)])
    assert [entry["latent"] for entry in _read(tmp_path)["latents"]] == first
    fit([TopActivatingTokens(latents=[7, 3], every_n_steps=4)])
    assert [entry["latent"] for entry in _read(tmp_path)["latents"]] == [7, 3]
    with pytest.raises(ValueError, match=r"latents=\[256\] do not exist: this SAE has latents 0 to 255"):
        fit([TopActivatingTokens(latents=[1, 256], every_n_steps=4)])


def test_without_a_model_only_the_token_itself_has_a_value(
    fit: Callable[..., Any], shards: Callable[[], Any], tmp_path: Path
) -> None:
    fit([TopActivatingTokens(latents=64, every_n_steps=2)], datamodule=shards())
    contexts = [context for entry in _read(tmp_path)["latents"] for context in entry["contexts"]]
    assert contexts
    for context in contexts:
        assert [i for i, value in enumerate(context["values"]) if value is not None] == [context["peak"]]


def test_without_the_documents_text_only_the_token_is_shown(
    fit: Callable[..., Any], shards: Callable[[], Any], tmp_path: Path
) -> None:
    datamodule = shards()
    datamodule.document_tokens = lambda index, document: None
    fit([TopActivatingTokens(latents=64, every_n_steps=2)], datamodule=datamodule)
    contexts = [context for entry in _read(tmp_path)["latents"] for context in entry["contexts"]]
    assert contexts
    assert {len(context["tokens"]) for context in contexts} == {1}


def test_a_datamodule_without_provenance_is_refused(
    fit: Callable[..., Any], shards: Callable[[], Any]
) -> None:
    datamodule = shards()
    datamodule.provenance = None
    with pytest.raises(ValueError, match=r"says where rows came from"):
        fit([TopActivatingTokens()], datamodule=datamodule)


def test_batches_and_weights_are_bit_identical_with_and_without_it(
    fit: Callable[..., Any], undisturbed: Callable[..., None]
) -> None:
    undisturbed(fit([]), fit([TopActivatingTokens(every_n_steps=1)]))


def test_merging_equals_sorting_everything_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(100, 6, generator=generator)
    provenance = torch.stack([torch.arange(100)] * 4, dim=1)
    strongest = Strongest(torch.tensor([1, 4]), keep=5)
    for start in range(0, 100, 7):  # the last batch is smaller than keep
        part = slice(start, start + 7)
        strongest.add({"h": rows[part]}, rows[part][:, [1, 4]], provenance[part])
    strongest.add({"h": rows[:7]}, rows[:7][:, [1, 4]], provenance[:7])  # served again
    want, index = rows[:, [1, 4]].T.topk(5)
    assert torch.equal(strongest.values, want)
    assert torch.equal(strongest.provenance[:, :, 0], index)
    assert torch.equal(strongest.rows["h"], rows[index])
    strongest.refresh(lambda x: -x["h"] + 1)
    want, order = (1 - want).sort(descending=True)
    assert torch.equal(strongest.values, want)
    assert torch.equal(strongest.provenance[:, :, 0], index.gather(1, order))


def test_rows_on_which_a_latent_does_not_fire_are_never_contexts() -> None:
    strongest = Strongest(torch.tensor([0]), keep=3)
    rows = torch.tensor([[0.0], [2.0], [-1.0]])
    strongest.add({"h": rows}, rows, torch.arange(12).reshape(3, 4))
    assert (strongest.values > 0).sum() == 1
    assert strongest.fired.tolist() == [1]


def test_nonsense_is_refused() -> None:
    for arguments in ({"latents": 0}, {"keep": 0}, {"latents": []}, {"before": -1}):
        with pytest.raises(ValueError, match="="):
            TopActivatingTokens(**arguments)  # type: ignore[arg-type]


def test_a_fit_that_is_too_short_says_so(
    fit: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback: L.Callback = TopActivatingTokens(every_n_steps=1000)
    with caplog.at_level("INFO"):
        fit([callback])
    assert any("saw no rows" in message for message in caplog.messages)
    assert not (tmp_path / "run" / "top_tokens").exists()
