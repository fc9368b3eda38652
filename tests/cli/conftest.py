"""Arguments of the command line for short runs on a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.texts import texts, write_jsonl


@pytest.fixture
def small(tiny: Callable[[str], str], tmp_path: Path) -> list[str]:
    """Arguments that make any config small, local and quick."""
    return [
        f"--data.hf_model={tiny('llama')}",
        f"--data.dataset_name={write_jsonl(tmp_path / 'texts.jsonl', texts(80, 900))}",
        "--data.layer=1",
        "--data.seq_length=32",
        "--data.batch_size=64",
        "--data.buffer_size=512",
        "--data.max_tokens=640",
        "--data.val_rows=200",
        "--data.val_fraction=0.2",
        f"--trainer.logger.init_args.save_dir={tmp_path / 'runs'}",
        f"--trainer.default_root_dir={tmp_path / 'runs'}",
        "--trainer.accelerator=cpu",
    ]
