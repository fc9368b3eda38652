"""Contexts of a trained SAE are those of the rows with the largest activations, from any source of rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoTokenizer

from deeplens_lightning import ActivationDataModule, SparseAutoencoder, top_contexts
from deeplens_lightning.callbacks.context_search import FoundContexts
from deeplens_lightning.extraction.predict import run as extract
from deeplens_lightning.reporting.readable_tokens import token_strings
from tests.support.texts import texts
from tests.support.training import data, sae

LATENTS = [5, 0, 63]


@pytest.fixture(scope="module")
def lm(tiny: Callable[[str], str]) -> str:
    return tiny("gpt2")


@pytest.fixture(scope="module")
def tiny_sae(lm: str) -> SparseAutoencoder:
    """An SAE that knows what it was trained on; its weights are random."""
    found = sae(data(lm))
    found.trained_on = {"model_name": lm, "hook_name": "layers.1.mlp_act"}
    return found


def shown(found: FoundContexts) -> list[list[tuple[Any, ...]]]:
    """The contexts without the number of their documents, which a streamed dataset counts in another order."""
    return [[(c.tokens, c.peak, c.position) for c in each.contexts] for each in found.latents]


def test_contexts_are_the_strongest_rows_with_the_text_around_them(
    lm: str, tiny_sae: SparseAutoencoder
) -> None:
    dm = data(lm, val_fraction=0.0)
    dm.setup("fit")
    batches = list(dm.train_dataloader())
    origins = torch.cat([dm.provenance(batch).stacked() for batch in batches])  # type: ignore[union-attr]
    with torch.no_grad():
        z = tiny_sae.encode(torch.cat(batches))
    dm.teardown("fit")
    found = top_contexts(tiny_sae, data(lm), LATENTS, keep=5, before=6, after=3)
    assert found.rows == len(z)
    tokenizer, documents = AutoTokenizer.from_pretrained(lm), texts(60)
    where = {(d, p): i for i, (_, d, p, _) in enumerate(origins.tolist())}
    for each in found.latents:
        column = z[:, each.latent]
        assert each.frequency == pytest.approx(float((column > 0).float().mean()))
        strongest = column.topk(5).values
        values = [context.value for context in each.contexts]
        assert values == pytest.approx(strongest[strongest > 0].tolist(), rel=1e-3)
        for context in each.contexts:
            ids = tokenizer(documents[context.document])["input_ids"]
            first = max(0, context.position - 6)
            assert context.tokens == token_strings(tokenizer, ids[first : context.position + 4])
            assert context.peak == context.position - first
            around = [where[context.document, first + i] for i in range(len(context.tokens))]
            assert context.values == pytest.approx(column[around].tolist(), rel=1e-3, abs=1e-4)
    assert [each.latent for each in found.latents] == LATENTS
    assert any(each.contexts for each in found.latents)
    assert f"latent {LATENTS[0]}, above 0 on" in str(found)
    assert "«" in str(found)


def test_cached_and_streamed_rows_have_the_same_contexts(
    lm: str, tiny_sae: SparseAutoencoder, tmp_path: Path
) -> None:
    wanted = top_contexts(tiny_sae, data(lm), LATENTS)
    extract(data(lm), str(tmp_path / "acts"), accelerator="cpu")
    cached = top_contexts(
        tiny_sae, ActivationDataModule(shards=str(tmp_path / "acts"), device="cpu"), LATENTS
    )
    assert cached == wanted
    stream = datasets.Dataset.from_dict({"text": texts(60)}).to_iterable_dataset()
    streamed = top_contexts(tiny_sae, data(lm, stream), LATENTS)
    assert streamed.rows == wanted.rows
    assert sorted(map(str, shown(streamed))) == sorted(map(str, shown(wanted)))


def test_the_number_of_rows_is_bounded_and_the_module_stays_open(
    lm: str, tiny_sae: SparseAutoencoder
) -> None:
    dm = data(lm)
    dm.setup("fit")
    assert top_contexts(tiny_sae, dm, 4, rows=50).rows == 50
    assert dm.model is not None
    dm.teardown("fit")
    top_contexts(tiny_sae, dm, 4, rows=50)
    assert dm.model is None


def test_rows_above_the_norm_limit_are_no_contexts(lm: str, tiny_sae: SparseAutoencoder) -> None:
    from deeplens_lightning.options import BufferOptions

    whole = top_contexts(tiny_sae, data(lm), LATENTS)
    limited = top_contexts(tiny_sae, data(lm, buffer_options=BufferOptions(max_norm_ratio=1.0)), LATENTS)
    assert limited.rows < whole.rows


def test_what_cannot_be_searched_is_refused_with_the_fix(
    lm: str, tiny_sae: SparseAutoencoder, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"latents=\[64\] do not exist: this SAE has latents 0 to 63"):
        top_contexts(tiny_sae, data(lm), [3, 64])
    with pytest.raises(
        ValueError, match=r"was trained on layers\.1\.mlp_act, and the data module serves layers\.0"
    ):
        top_contexts(tiny_sae, data(lm, layer=0), [3])
    with pytest.raises(ValueError, match="rows=0 and keep=8 must be at least 1"):
        top_contexts(tiny_sae, data(lm), [3], rows=0)
    torch.save(torch.randn(500, 128), tmp_path / "bare.pt")
    bare = ActivationDataModule(lm, 1, "mlp_act", shards=str(tmp_path / "bare.pt"), device="cpu")
    with pytest.raises(ValueError, match="the rows have no token ids, as in shards of bare tensors"):
        top_contexts(tiny_sae, bare, [3])
