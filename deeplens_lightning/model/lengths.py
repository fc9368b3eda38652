"""Find the lengths in tokens from which on a model may compute differently, in its configuration.

In: a configuration. Out: settings that are lengths, such as the width of a sliding window.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PretrainedConfig

_LENGTH = re.compile(
    r"window|chunk|max_.*(position|distance)|original_.*position|floor_scale|_context|context_|radius|span"
    r"|local_att|block_(size|len)|index_top_?k|dense_len|position_buckets|kernel_size"
)
"""Names that transformers gives to lengths in tokens. One too many costs a longer probe; one too few, wrong rows."""

_COUNT = re.compile(r"layer|pattern")
"""Names that match `_LENGTH` and are no length, such as `max_window_layers`."""


def lengths_of(config: PretrainedConfig, block: int) -> list[tuple[str, int]]:
    """Settings that are lengths in tokens (windows, chunks, RoPE contexts and the like), with their values.

    Args:
        config: configuration of the whole model; of a multimodal one, the part of the language model is read.
        block: positions of a block in tokens; lengths that a block does not reach are left out.
    """
    found = _lengths(config.get_text_config().to_dict(), "")
    return [(name, n) for name, n in found if n < block or (n == block and "position" not in name)]


def _lengths(settings: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, int]]:
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _lengths(value, f"{name}.")
        elif _LENGTH.search(str(key)) and not _COUNT.search(str(key)):
            yield from ((name, int(x)) for x in (value if isinstance(value, list) else [value]) if _counts(x))


def _counts(value: Any) -> bool:
    """Whether a value can be a number of tokens."""
    return type(value) in (int, float) and value > 1 and float(value).is_integer()
