"""Tokens as people read them: one short printable string per token id.

In: a tokenizer and ids, or strings that came from anywhere. Out: strings without control
characters, so that a figure, a table or a web page shows every token on one line, in its place.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SYMBOLS = {"\n": "⏎", "\t": "⇥", "\r": "␍", " ": "·"}
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def token_strings(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token on its own, e.g. `[" Paris", "!"]`.

    A token that is only a part of a character's UTF-8 bytes has no text of its own; its vocabulary
    entry stands in for it.

    Args:
        tokenizer: whose ids these are.
        ids: token ids, `(seq_length,)`.

    Returns:
        One string per id, not yet escaped (see `readable`).
    """
    texts = [str(tokenizer.decode([i], clean_up_tokenization_spaces=False)) for i in ids]
    entries = tokenizer.convert_ids_to_tokens(list(ids))
    return [
        str(entry) if not text or _REPLACEMENT in text else text
        for text, entry in zip(texts, entries, strict=True)
    ]


def readable(token: str, max_chars: int = 24) -> str:
    """One printable line for a token: white space and control characters become visible.

    A leading or trailing space is drawn as `·`, a newline as `⏎`, a tab as `⇥`; every other control
    or invisible formatting character (bidirectional overrides among them, which would reorder what
    stands beside them) as its code point, `<U+202E>`. Longer tokens are cut with `…`.
    """
    text = visible(token)
    inner = text.strip(" ")
    if inner != text:
        left = len(text) - len(text.lstrip(" "))
        text = "·" * left + inner + "·" * (len(text) - left - len(inner))
    return text if len(text) <= max_chars else text[: max_chars - 1] + "…"


def visible(text: str) -> str:
    """`text` with control, formatting and unusual space characters written out; ordinary spaces stay."""
    return "".join(_visible(char) for char in text)


def code_point(char: str) -> str:
    """`<U+1F600>`: how a character that cannot be shown is written."""
    return f"<U+{ord(char):04X}>"


def _visible(char: str) -> str:
    if char == " ":
        return char
    if char in _SYMBOLS:
        return _SYMBOLS[char]
    # Cc control, Cf formatting (zero width joiners, bidi overrides), Cs surrogate, Co private, Cn unassigned,
    # Zl and Zp line and paragraph separators, Zs other spaces.
    category = unicodedata.category(char)
    return code_point(char) if category[0] == "C" or category in {"Zl", "Zp", "Zs"} else char
