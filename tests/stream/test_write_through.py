"""`write_shards=`: the first epoch is computed and written, later epochs are read; no row is written twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deeplens_lightning import ActivationDataModule
from deeplens_lightning.shards import ShardStream, verify
from tests.stream.small_stream import small_stream


def epoch(data: ActivationDataModule, limit: int | None = None) -> tuple[list[Tensor], list[tuple[int, int]]]:
    batches, keys = [], []
    for batch in data.train_dataloader():
        where = data.provenance(batch)
        assert where is not None
        batches.append(batch.clone())
        keys += list(zip(where.document_index.tolist(), where.position.tolist(), strict=True))
        if limit is not None and len(batches) == limit:
            break
    return batches, keys


def cached(folder: Path) -> list[tuple[int, int]]:
    stream = ShardStream(str(folder), batch_size=64, split="train", val_fraction=0.2, shuffle="none")
    return [
        (int(row[1]), int(row[2]))
        for served in stream.batches(stream.start(), 0)
        for row in served.provenance
    ]


def test_the_first_epoch_is_the_live_one_and_the_second_reads_all_of_it(
    tiny: Callable[[str], str], tmp_path: Path
) -> None:
    plain = small_stream(tiny("llama"))
    plain.setup("fit")
    wanted, keys = epoch(plain)
    raw = dict(zip(keys, torch.cat(wanted), strict=True))
    validation = torch.cat(list(plain.val_dataloader()))
    plain.teardown("fit")

    data = small_stream(tiny("llama"), write_shards=str(tmp_path / "cache"))
    data.setup("fit")
    first, _ = epoch(data)
    assert len(first) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(first, wanted, strict=True))
    assert data.model is not None
    data.model.activations = None  # type: ignore[method-assign,assignment]  from here on it must not run
    second, second_keys = epoch(data)
    assert sorted(second_keys) == sorted(keys)
    assert torch.equal(torch.cat(second), torch.stack([raw[key] for key in second_keys]))
    data.teardown("fit")

    assert verify(str(tmp_path / "cache")).problems == []
    assert sorted(cached(tmp_path / "cache")) == sorted(keys)
    later = small_stream(tiny("llama"), write_shards=str(tmp_path / "cache"))
    later.setup("fit")
    assert sorted(epoch(later)[1]) == sorted(keys)
    later.teardown("fit")
    alone = ActivationDataModule(
        "/no/model", shards=str(tmp_path / "cache"), batch_size=64, val_fraction=0.2, val_rows=200
    )
    alone.setup("fit")
    found = torch.cat(list(alone.val_dataloader()))
    assert sorted(found.norm(dim=1).tolist()) == pytest.approx(sorted(validation.norm(dim=1).tolist()))
    alone.teardown("fit")


@pytest.mark.parametrize("stop", [1, 7, 20])
def test_stopping_in_the_first_epoch_writes_no_row_twice(
    tiny: Callable[[str], str], tmp_path: Path, stop: int
) -> None:
    plain = small_stream(tiny("llama"))
    plain.setup("fit")
    wanted, keys = epoch(plain)
    plain.teardown("fit")

    data = small_stream(tiny("llama"), write_shards=str(tmp_path / "cache"))
    data.setup("fit")
    got, _ = epoch(data, limit=stop)
    state = data.state_dict()
    epoch(data, limit=3)  # stops some batches after the checkpoint
    data.on_exception(KeyboardInterrupt())
    again = small_stream(tiny("llama"), write_shards=str(tmp_path / "cache"))
    again.setup("fit")
    again.load_state_dict(state)
    rest, _ = epoch(again)
    assert all(torch.equal(a, b) for a, b in zip([*got, *rest], wanted, strict=True))
    _, second = epoch(again)
    again.teardown("fit")
    assert sorted(second) == sorted(keys)
    assert sorted(cached(tmp_path / "cache")) == sorted(keys)


def test_reading_an_unfinished_cache_says_that_the_fit_can_be_run_again(
    tiny: Callable[[str], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = small_stream(tiny("llama"), write_shards=str(tmp_path / "cache"))
    data.setup("fit")
    epoch(data, limit=5)
    data.teardown("fit")
    reading = ActivationDataModule(shards=str(tmp_path / "cache"), batch_size=16)
    assert reading.d_in
    assert (
        "run the command that wrote it again (extract, or fit with write_shards) to continue" in caplog.text
    )
    assert "extract command" not in caplog.text


def test_a_run_that_reads_the_written_cache_resumes_bit_for_bit(
    tiny: Callable[[str], str], tmp_path: Path
) -> None:
    data = small_stream(tiny("llama"), write_shards=str(tmp_path / "cache"))
    data.setup("fit")
    epoch(data)
    whole, _ = epoch(data)
    third, _ = epoch(data, limit=4)
    state = data.state_dict()
    data.teardown("fit")
    again = small_stream(tiny("llama"), write_shards=str(tmp_path / "cache"))
    again.setup("fit")
    again.load_state_dict(state)
    rest, _ = epoch(again)
    assert len(third) + len(rest) == len(whole)
    again.teardown("fit")
    settings: dict[str, Any] = {
        "shards": str(tmp_path / "cache"),
        "batch_size": 64,
        "val_fraction": 0.2,
        "val_rows": 200,
    }
    cache = ActivationDataModule("/no/model", **settings)
    cache.setup("fit")
    full, _ = epoch(cache)
    cache.setup("fit")
    cache.teardown("fit")
    cache.setup("fit")
    got, _ = epoch(cache, limit=5)
    state = cache.state_dict()
    cache.teardown("fit")
    resumed = ActivationDataModule("/no/model", **settings)
    resumed.setup("fit")
    resumed.load_state_dict(state)
    rest, _ = epoch(resumed)
    assert all(torch.equal(a, b) for a, b in zip([*got, *rest], full, strict=True))
    resumed.teardown("fit")


def test_a_cache_of_other_settings_is_refused(tiny: Callable[[str], str], tmp_path: Path) -> None:
    data = small_stream(tiny("llama"), write_shards=str(tmp_path / "cache"))
    data.setup("fit")
    epoch(data)
    data.teardown("fit")
    other = small_stream(tiny("llama"), write_shards=str(tmp_path / "cache"), seq_length=16)
    other.setup("fit")
    with pytest.raises(ValueError, match="seq_length"):
        epoch(other)
    other.teardown("fit")
