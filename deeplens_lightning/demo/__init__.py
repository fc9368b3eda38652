"""The embedded model and its text: everything a newcomer needs, without a hub."""

from __future__ import annotations

from pathlib import Path


def lm_folder() -> Path:
    """Folder of `demo:lm`, a small GPT-2-shaped model trained on docstrings, with its tokenizer."""
    return Path(__file__).parent / "lm"
