"""Turn texts into token ids, and find the special tokens that a tokenizer puts around a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from deeplens_lightning.text.sources import Row


def tokenize(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase | None) -> list[NDArray[np.int64]]:
    """Tokenise texts without adding special tokens; documents that are token ids already are returned unchanged.

    Args:
        rows: texts, or lists of token ids.
        tokenizer: needed for texts, not used for token ids.

    Returns:
        int64 `(tokens,)` for each document, empty for a text of white space.

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
            "the documents are texts and the model has no tokenizer: give tokenizer= a folder, a hub id or a tokenizer"
        )
    if (
        tokenizer.is_fast
    ):  # gives the same ids as the tokenizer's call, without computing offsets, words and masks
        backend: Any = tokenizer.backend_tokenizer
        ids = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    else:
        ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return [np.asarray(i if text.strip() else [], dtype=np.int64) for text, i in zip(texts, ids, strict=True)]


def special_affixes(
    tokenizer: PreTrainedTokenizerBase | None, prepend_bos: bool | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Find the special tokens to put before and after every segment.

    Args:
        tokenizer: the model's tokenizer.
        prepend_bos: None for the special tokens that the tokenizer itself adds, True for at least a BOS token in front,
            False for no special tokens.

    Returns:
        The token ids before a segment, and those after it.

    Raises:
        ValueError: `prepend_bos=True` and the tokenizer has no BOS token.
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
            raise ValueError("prepend_bos=True, but the tokenizer has no BOS token; do not set prepend_bos")
        prefix = (int(bos),)
    return prefix, suffix
