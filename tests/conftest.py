"""Tiny real models, shared by the tests of the stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.support.tiny import save_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Folder of a tiny model of a family, made once."""
    made: dict[str, str] = {}

    def folder(model_type: str = "llama") -> str:
        if model_type not in made:
            made[model_type] = str(save_tiny(tmp_path_factory.mktemp(model_type), model_type))
        return made[model_type]

    return folder


@pytest.fixture
def untouched_rng() -> Iterator[None]:
    """The test must leave torch's global random state as it was."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state())


@pytest.fixture
def save_lm() -> Callable[..., Path]:
    """`save_tiny`, for tests that need a model of another shape, or one to damage."""
    return save_tiny
