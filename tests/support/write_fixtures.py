"""Write small files in the formats of the present release: `python -m tests.support.write_fixtures FOLDER`.

Later releases read the files of `tests/fixtures/v1`, which the release with format version 1 wrote by this script.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import torch

from deeplens_lightning.datamodule import ActivationDataModule
from deeplens_lightning.options import CacheOptions
from deeplens_lightning.shards import ShardWriter
from tests.support.caches import feed, make_rows, manifest, write_cache
from tests.support.models import save_model
from tests.support.ranks import launch
from tests.support.recorder import take
from tests.support.training import data, sae, trainer

ROWS, SHARD_ROWS = 90, 40
"""Rows of each cache and of a full shard."""


def write_caches(folder: Path) -> None:
    """Write a finished, a finished int8, an unfinished and a two-rank cache of `make_rows(ROWS)` into `folder`."""
    write_cache(folder / "exact", n=ROWS, shard_rows=SHARD_ROWS)
    write_cache(folder / "int8", n=ROWS, shard_rows=SHARD_ROWS, storage="int8")
    rows, provenance = make_rows(ROWS)
    size = SHARD_ROWS * manifest().row_bytes
    with ShardWriter(folder / "unfinished", manifest(), shard_bytes=size) as writer:
        feed(writer, rows, provenance, batch=20)
    for rank in (0, 1):
        half = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
        part = {name: value[half] for name, value in rows.items()}
        with ShardWriter(folder / "two_ranks", manifest(world_size=2), rank=rank, shard_bytes=size) as writer:
            feed(writer, part, provenance[half], batch=20)
            writer.finish()
    for lock in folder.glob("*/.lock-*"):
        lock.unlink()


def live_data(model: str, **changes: Any) -> ActivationDataModule:
    """A live data module over made-up token ids, which need no tokenizer."""
    documents = [[1 + (7 * i + j * j) % 500 for j in range(5 + 11 * i % 70)] for i in range(40)]
    return data(model, datasets.Dataset.from_dict({"text": documents}), **changes)


CACHES = {
    "few": (6, "global", {}),
    "many": (24, "global", {}),
    "scaled": (6, "global", {"normalize": "zscore"}),
    "window": (6, "window", {}),
    "window_many": (24, "window", {}),
    "unshuffled": (24, "none", {}),
    "epoch_end": (24, "global", {}),
}
"""By name of a state: number of shards of the cache, shuffle, and further settings of the data module."""
CACHE_ROWS, WINDOW_ROWS = 600, 250


def cached_data(folder: Path, name: str) -> ActivationDataModule:
    """The data module of a state of `CACHES`; writes its cache to `folder` at first."""
    shards, shuffle, settings = CACHES[name]
    if not folder.exists():
        write_cache(folder, n=CACHE_ROWS, shard_rows=CACHE_ROWS // shards)
    options = CacheOptions(shuffle=shuffle)
    return ActivationDataModule(
        shards=str(folder), batch_size=40, val_fraction=0.2, cache_options=options, **settings
    )


def write_states(folder: Path) -> None:
    """Write states of data modules, and the provenance of the three batches that follow: `(3, batch, 4)`."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        model = str(save_model(Path(work) / "model"))
        save_state(folder / "live.pt", live_data(model), after=9)
        live = opened(live_data(model, seq_length=16)).live
        assert live is not None
        *_, last = live.extraction(None)
        torch.save(
            {"source": last.source, "row": last.first_row, "rows": last.provenance}, folder / "source.pt"
        )
        save_state(folder / "scaled_live.pt", live_data(model, normalize="center"), after=30)
        launch(2, train_on_two_ranks, model, work)
        state = torch.load(Path(work) / "state.pt", weights_only=True)
        alone = live_data(model, resume_anyway=True)
        alone.setup("fit")
        alone.load_state_dict(state)
        torch.save({"state": state, "next": next_rows(alone)}, folder / "two_ranks.pt")
        window = WINDOW_ROWS * manifest().row_bytes
        with patch("deeplens_lightning.shards.shard_stream.machine_memory", lambda: 8 * window):
            for name in CACHES:
                datamodule = cached_data(Path(work) / name, name)
                after = len(opened(datamodule).train_dataloader()) if name == "epoch_end" else 5
                save_state(folder / f"{name}.pt", datamodule, after=after)


def save_state(path: Path, datamodule: ActivationDataModule, *, after: int) -> None:
    """Save the state after a number of batches, and the provenance of the next three."""
    opened(datamodule)
    take(datamodule, after)
    state = datamodule.state_dict()
    torch.save({"state": state, "next": next_rows(datamodule)}, path)


def opened(datamodule: ActivationDataModule) -> ActivationDataModule:
    """The same data module after `setup`."""
    datamodule.setup("fit")
    return datamodule


def next_rows(datamodule: ActivationDataModule) -> torch.Tensor:
    """Provenance of the next three batches, int64 `(3, batch, 4)`."""
    return torch.stack([rows for _, rows in take(datamodule, 3)])


def train_on_two_ranks(rank: int, ranks: int, model: str, work: str) -> None:
    """Train six steps on each rank, and save the state of the data module in the folder `work`."""
    datamodule = live_data(model, val_fraction=0.0)
    fit = trainer(work, max_steps=6, devices=ranks, strategy="ddp")
    fit.fit(sae(datamodule), datamodule)
    if rank == 0:
        torch.save(datamodule.state_dict(), Path(work) / "state.pt")


def main() -> None:
    """Write everything into the folder that the command line names."""
    folder = Path(sys.argv[1])
    write_caches(folder / "caches")
    write_states(folder / "states")


if __name__ == "__main__":
    main()
