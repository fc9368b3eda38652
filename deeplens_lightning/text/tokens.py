"""Turn texts into token ids, and find the special tokens that a tokenizer puts around a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from deeplens_lightning.text.sources import Row


def tokenize(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase | None) -> list[NDArray[np.int64]]:
    """Token ids of texts, without special tokens around them; rows of token ids are taken as they are.

    White space alone counts as no text.

    Args:
        rows: texts, or rows of token ids.
        tokenizer: not used for token ids.

    Returns:
        int64 `(tokens,)` for each row, empty where there is no text.

    Raises:
        ValueError: there are texts and no tokenizer.
    """
    texts = [row for row in rows if isinstance(row, str)]
    if len(texts) < len(rows):
        return [np.asarray(row, dtype=np.int64) for row in rows]
    if not texts:
        return []
    if tokenizer is None:
        raise ValueError(
            "these documents are texts and the model has no tokenizer of its own: give tokenizer="
        )
    if tokenizer.is_fast:  # the same ids as calling the tokenizer gives, without offsets, words and masks
        backend: Any = tokenizer.backend_tokenizer
        ids = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    else:
        ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return [np.asarray(i if text.strip() else [], dtype=np.int64) for text, i in zip(texts, ids, strict=True)]


def special_affixes(
    tokenizer: PreTrainedTokenizerBase | None, prepend_bos: bool | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that go before and behind every segment.

    Args:
        tokenizer: the model's.
        prepend_bos: None for what the tokenizer itself puts around a text, True for a BOS in front whatever it
            does, False for nothing.

    Raises:
        ValueError: a BOS is wanted and the tokenizer has none.
    """
    if tokenizer is None or prepend_bos is False:
        return (), ()
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    first = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    prefix, suffix = tuple(whole[:first]), tuple(whole[first + len(bare) :])
    if prepend_bos and not prefix:
        bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
        if bos is None:
            raise ValueError("prepend_bos=True, but the tokenizer has no BOS token; leave prepend_bos out")
        prefix = (int(bos),)
    return prefix, suffix
