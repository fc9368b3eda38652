"""A small language model and a text dataset that come with the package and need no download."""

from __future__ import annotations

from pathlib import Path


def lm_folder() -> Path:
    """Folder of `demo:lm`: a small model with GPT-2's architecture, trained on docstrings, and its tokenizer."""
    return Path(__file__).parent / "lm"
