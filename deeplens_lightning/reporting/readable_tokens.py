"""Turn token ids into short printable strings, one for each token.

In: a tokenizer and ids, or any strings. Out: strings in which control characters are visible, so that a figure, a table
or a web page shows every token on one line, in its place.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SYMBOLS = {"\n": "⏎", "\t": "⇥", "\r": "␍"}
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def token_strings(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token on its own, e.g. `[" Paris", "!"]`.

    A token that holds only some of the UTF-8 bytes of a character has no text of its own; its entry in the vocabulary
    is returned instead.

    Args:
        tokenizer: the tokenizer of the ids.
        ids: token ids, `(seq_length,)`.

    Returns:
        One string for each id. Control characters are left as they are; see `readable`.
    """
    texts = [str(tokenizer.decode([i], clean_up_tokenization_spaces=False)) for i in ids]
    entries = tokenizer.convert_ids_to_tokens(list(ids))
    return [
        str(entry) if not text or _REPLACEMENT in text else text
        for text, entry in zip(texts, entries, strict=True)
    ]


def readable(token: str, max_chars: int = 24) -> str:
    """Write a token as one printable line, with white space and control characters made visible.

    A leading or trailing space becomes `·`, a newline `⏎`, a tab `⇥`. Every other control or invisible formatting
    character becomes its code point, such as `<U+202E>`; these include bidirectional overrides, which would reorder the
    text beside them.

    Args:
        token: text of the token.
        max_chars: longer results are cut to this number of characters, the last of which is then `…`.
    """
    text = visible(token)
    inner = text.strip(" ")
    if inner != text:
        left = len(text) - len(text.lstrip(" "))
        text = "·" * left + inner + "·" * (len(text) - left - len(inner))
    return text if len(text) <= max_chars else text[: max_chars - 1] + "…"


def visible(text: str) -> str:
    """Make control, formatting and unusual space characters of a text visible; ordinary spaces stay."""
    return "".join(_visible(char) for char in text)


def code_point(char: str) -> str:
    """The code point of a character in the form `<U+1F600>`, for characters that cannot be shown."""
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
