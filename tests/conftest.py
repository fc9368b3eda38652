"""Fixtures of all tests: tiny models on disk, and processes that can be killed."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext

# One thread a process, in processes that tests start too: with two, several processes on two cores run many times
# slower, and the tests would depend on how busy the machine is.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The process that others are forked from must have no thread: pyarrow's allocator would start one.
os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from tests.support.models import save_model

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # a plugin may have imported torch before


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Return the folder of a tiny model of a family, which is made once."""
    made: dict[str, str] = {}

    def folder(model_type: str = "llama") -> str:
        if model_type not in made:
            made[model_type] = str(save_model(tmp_path_factory.mktemp(model_type), model_type))
        return made[model_type]

    return folder


@pytest.fixture
def untouched_rng() -> Iterator[None]:
    """Check that the test leaves torch's global random state as it was."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state())


@pytest.fixture(scope="session")
def processes() -> ForkServerContext:
    """Start real processes from one that has imported the slow modules already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "deeplens_lightning.extraction.shard_prediction_writer",
            "deeplens_lightning.shards",
            "tests.support.kills",
            "transformers.models.gpt2.modeling_gpt2",
        ]
    )
    return context
