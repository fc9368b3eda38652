"""Measure the size and time of checkpoints, the time to resume, and how well rows are shuffled. Prints JSON.

    python examples/benchmarks/resume_and_mixing.py --hf-model demo:lm --out resume.json

- checkpoint: size of the data module's state, seconds to make it and to save it, with buffers of 10^4 and 10^6 rows;
- resume: seconds to the first batch after resuming at 1% and at 95% of a local JSONL dataset;
- mixing: mean number of other rows of the same document in a row's batch, with and without the block shuffle, and for a
  full shuffle of an epoch.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterable
from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deeplens_lightning import ActivationDataModule
from deeplens_lightning.options import BufferOptions
from deeplens_lightning.text.sources import open_source


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hf-model", default="demo:lm")
    parser.add_argument("--dataset-name", default="demo:docs")
    parser.add_argument("--layer", type=int, default=1)
    parser.add_argument("--hook", default="mlp_out")
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument(
        "--buffer-size", type=int, default=65_536, help="rows in the buffer, for resume and mixing"
    )
    parser.add_argument("--documents", type=int, default=20_000, help="documents in the dataset, for resume")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    base = {
        "hf_model": given.hf_model,
        "layer": given.layer,
        "hook": given.hook,
        "batch_size": given.batch_size,
        "seq_length": 128,
        "val_fraction": 0.0,
    }
    found = {
        "checkpoint": [checkpoint(base, given.dataset_name, rows) for rows in (10_000, 1_000_000)],
        "resume": resume(base, given.dataset_name, given.documents, given.buffer_size),
        "mixing": mixing(base, given.dataset_name, given.buffer_size),
    }
    text = json.dumps(found, indent=2)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")


def checkpoint(base: dict[str, Any], dataset: str, rows: int) -> dict[str, float]:
    """Size of the data module's state in bytes, and seconds to make and save it, after three batches."""
    dm = opened(base, dataset, max(rows, base["batch_size"]), normalize="zscore")
    list(islice(dm.train_dataloader(), 3))
    begun = time.perf_counter()
    state = dm.state_dict()
    taken = time.perf_counter()
    with tempfile.NamedTemporaryFile() as file:
        torch.save(state, file.name)
        saved = time.perf_counter()
        size = Path(file.name).stat().st_size
    dm.teardown("fit")
    return {"buffer_rows": rows, "bytes": size, "state_s": taken - begun, "save_s": saved - taken}


def resume(base: dict[str, Any], dataset: str, documents: int, buffer: int) -> list[dict[str, float]]:
    """Seconds to the first batch after `load_state_dict`, early and late in an epoch of a JSONL file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "texts.jsonl"
        path.write_text(
            "".join(json.dumps({"text": text[:800]}) + "\n" for text in texts(dataset, documents))
        )
        dm = opened(base, str(path), buffer)
        begun = time.perf_counter()
        states = [deepcopy(dm.state_dict()) for _ in dm.train_dataloader()]
        epoch = time.perf_counter() - begun
        results = []
        for share in (0.01, 0.95):
            at = int(share * len(states))
            dm.load_state_dict(states[at])
            begun = time.perf_counter()
            next(iter(dm.train_dataloader()))
            seconds = time.perf_counter() - begun
            results.append({"share": share, "batch": at, "first_batch_s": seconds, "epoch_s": epoch})
        dm.teardown("fit")
    return results


def texts(dataset: str, count: int) -> Iterable[str]:
    """Yield `count` documents of a dataset, repeating it if it has fewer."""
    number = 0
    while number < count:
        for text in islice(open_source(dataset).read(0, 0, seed=0, epoch=0), count - number):
            yield str(text.row) + f" {number}"
            number += 1


def mixing(base: dict[str, Any], dataset: str, buffer: int) -> dict[str, float]:
    """Mean number of other rows of the same document in a row's batch, once the windows of the shuffle are full."""
    found = {}
    for name, pool in (("with block pool", True), ("without block pool", False)):
        dm = opened(base, dataset, buffer, buffer_options=BufferOptions(shuffle_blocks=pool))
        batches = list(islice(documents_of(dm), 6 * buffer // base["batch_size"]))[
            2 * buffer // base["batch_size"] :
        ]
        found[name] = beside(batches)
        dm.teardown("fit")
    dm = opened(base, dataset, buffer)
    everything = torch.cat(list(documents_of(dm)))
    dm.teardown("fit")
    shuffled = everything[torch.randperm(len(everything), generator=torch.Generator().manual_seed(0))]
    found["full shuffle of an epoch"] = beside(shuffled.split(base["batch_size"])[:-1])
    return found


def documents_of(dm: ActivationDataModule) -> Iterable[Tensor]:
    """Iterate over the document indices of the rows of each batch, int64 `(batch,)`, for one epoch."""
    for batch in dm.train_dataloader():
        provenance = dm.provenance(batch)
        assert provenance is not None
        yield provenance.document_index.clone()


def beside(batches: Iterable[Tensor]) -> float:
    """Mean over rows of the number of other rows of the batch that have the same label."""
    pairs, rows = 0.0, 0
    for labels in batches:
        counts = torch.unique(labels, return_counts=True)[1].double()
        pairs, rows = pairs + float((counts * (counts - 1)).sum()), rows + len(labels)
    return pairs / max(rows, 1)


def opened(base: dict[str, Any], dataset: str, buffer: int, **changes: Any) -> ActivationDataModule:
    """Make a data module and call `setup`, without a Trainer."""
    dm = ActivationDataModule(dataset_name=dataset, buffer_size=buffer, **base, **changes)
    dm.setup("fit")
    return dm


if __name__ == "__main__":
    main()
