"""Token ids are those of the tokenizer itself, and special tokens are found where the tokenizer puts them."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from deeplens_lightning.text.tokens import special_affixes, tokenize
from tests.support.texts import texts


def test_tokenizing_in_groups_gives_what_the_tokenizer_gives(tiny: object) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))  # type: ignore[operator]
    documents = texts(20)
    got = tokenize(documents, tokenizer)
    for text, tokens in zip(documents, got, strict=True):
        wanted = tokenizer(text, add_special_tokens=False)["input_ids"] if text.strip() else []
        assert tokens.tolist() == wanted


def test_texts_without_a_tokenizer_are_refused() -> None:
    with pytest.raises(ValueError, match="give tokenizer="):
        tokenize(["text"], None)


def test_a_bos_goes_in_front_when_asked_for(tiny: object) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))  # type: ignore[operator]
    assert special_affixes(tokenizer, None) == ((), ())  # this tokenizer adds nothing of its own
    assert special_affixes(tokenizer, True) == ((0,), ())
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="no BOS token"):
        special_affixes(tokenizer, True)
