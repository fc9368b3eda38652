"""Run the real command-line parser on some words, and return all settings that it found."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import yaml

from deeplens_lightning.cli.main import main


def parsed(command: str, *words: str) -> dict[str, Any]:
    """The settings of `deeplens-lightning COMMAND WORDS`; nothing is built or run."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        main([command, *words, "--print_config"])
    settings: dict[str, Any] = yaml.safe_load(shown.getvalue())
    assert settings, "the words do not parse; the error is on stderr"
    return settings
