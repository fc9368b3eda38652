"""Extraction: one rank's rows in source order, each with the place from which it can be computed again.

In: a frozen model, documents, their packing. Out: model batches of rows, numbered, for a `ShardWriter`. There
is no buffer and no shuffle here: readers of the cache shuffle.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import chain, islice
from typing import Any, NamedTuple

from torch import Tensor

from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.model.rows import run_model
from deeplens_lightning.shards.format import DTYPES, Manifest, Resume, Rows
from deeplens_lightning.shards.writer import SHARD_BYTES
from deeplens_lightning.text.documents import Documents
from deeplens_lightning.text.packing import Chunk, Packing, TokenizedDocument, model_batches
from deeplens_lightning.text.sources import IndexedSource

_SAMPLED_DOCUMENTS = 256


class ModelRows(NamedTuple):
    """The rows of one model batch.

    Attributes:
        rows: `(n, d_in)` by canonical hook name, on the model's device.
        provenance: int64 `(n, 4)`.
        source: JSON-able place from which they come again.
        first_row: number of the first of them among this rank's rows.
        tokens: how many tokens the model read for them.
    """

    rows: dict[str, Tensor]
    provenance: Tensor
    source: dict[str, Any]
    first_row: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What an extraction will take, estimated from a sample of its documents.

    Attributes:
        rows: of all ranks; None where the number of documents is unknown.
        row_bytes: on disk.
        rows_per_second: of this rank.
        memory: bytes on this rank beside the model: two shards, and one model batch.
        ranks: that share the work.
    """

    rows: int | None
    row_bytes: int
    rows_per_second: float
    memory: int
    ranks: int

    def __str__(self) -> str:
        rows, per = self.rows, "in all"
        if rows is None:
            rows, per = 10**6, "per million rows (the number of documents is not known)"
        hours = rows / self.rows_per_second / self.ranks / 3600
        duration = f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"
        return (
            f"{per}: {rows:,} rows, {rows * self.row_bytes:,} bytes on disk, {duration} on {self.ranks} "
            f"rank(s) ({self.rows_per_second:,.0f} rows/s each); {self.memory:,} bytes of memory "
            "beside the model"
        )


@dataclass(kw_only=True)
class Extraction:
    """Rows of a model on documents, in the documents' order. Iterating begins at `resume`.

    Attributes:
        model: run up to the deepest hook point.
        documents: what this rank reads: every document, held out or not (`val_fraction=0`), so that the
            cache can be split by the same hashes as the text.
        packing: how they become blocks.
        inference_batch_size: blocks a model batch.
        config: JSON-able description of dataset, packing and whatever else decides the rows.
        max_rows: end after so many rows of this rank.
        resume: where to begin, from a `ShardWriter`; None when there is nothing left to do.
        exhausted: whether the last iteration came to the end.
    """

    model: FrozenModel
    documents: Documents
    packing: Packing
    inference_batch_size: int
    config: Mapping[str, Any]
    max_rows: int | None = None
    resume: Resume | None = field(default_factory=lambda: Resume(None, 0, 0))
    exhausted: bool = False

    def manifest(self, storage: str = "exact", extra: Mapping[str, Any] | None = None) -> Manifest:
        """What a cache of these rows is."""
        names = {dtype: name for name, dtype in DTYPES.items()}
        packing = {
            "seq_length": self.packing.seq_length,
            "prefix": list(self.packing.prefix),
            "suffix": list(self.packing.suffix),
            "excluded": list(self.packing.excluded),
            "drop_first_n": self.packing.drop_first_n,
            "inference_batch_size": self.inference_batch_size,
            "isolation": self.model.isolation,
        }
        return Manifest(
            hook_points={
                point.name: Rows(d_in=point.d_in, dtype=names[self.model.dtypes[point.name]])
                for point in self.model.hook_points
            },
            storage=storage,
            config={
                "model": self.model.identity,
                "dataset": self.documents.source.identity,
                "documents": {"seed": self.documents.seed, "max_rows": self.max_rows},
                "packing": packing,
                **self.config,
            },
            world_size=self.documents.ranks,
            versions={name: version(name) for name in ("torch", "transformers", "datasets")},
            extra=extra or {},
        )

    def __iter__(self) -> Iterator[ModelRows]:
        self.exhausted = False
        if self.resume is not None:
            yield from self._rows(self.resume)
        self.exhausted = True

    def _rows(self, resume: Resume) -> Iterator[ModelRows]:
        at = resume.source or {"start": None, "row": 0}
        number: int = at["row"]
        for chunk in self.packing.chunks(self._documents(at["start"])):
            source = {"start": chunk.start, "row": number}
            for index in model_batches(chunk.blocks, self.inference_batch_size, self.model.isolation):
                blocks = chunk.blocks.select(index)
                first, count = number, int(blocks.keep.sum())
                number += count
                if number <= resume.row:
                    continue  # written before: counted, not computed
                activations, wanted, provenance = run_model(self.model, blocks)
                if self.max_rows is not None:
                    wanted = wanted[: max(0, self.max_rows - first)]
                rows = {name: x.index_select(0, wanted.to(x.device)) for name, x in activations.items()}
                tokens = int((blocks.positions >= 0).sum())
                yield ModelRows(rows, provenance[: len(wanted)], source, first, tokens)
                if self.max_rows is not None and number >= self.max_rows:
                    return

    def _documents(self, start: Mapping[str, Any] | None) -> Iterator[TokenizedDocument]:
        """From where a chunk began; chunks are packed from consecutive segments, so they come again."""
        documents = self.documents.read(0, start["document"] if start else None)
        if start and (first := next(documents, None)) is not None:
            segment = max(first.first_segment, start["segment"])
            documents = chain([replace(first, first_segment=segment)], documents)
        return documents

    def plan(self, storage: str = "exact", shard_bytes: int = SHARD_BYTES, batches: int = 4) -> Plan:
        """Estimate rows, bytes, time and memory from a few hundred documents and a few model batches."""
        manifest = self.manifest(storage)
        sample = list(islice(self.documents.read(0), _SAMPLED_DOCUMENTS))
        chunks: list[Chunk] = list(self.packing.chunks(sample))
        kept = sum(int(chunk.blocks.keep.sum()) for chunk in chunks)
        source = self.documents.source
        rows = None
        if isinstance(source, IndexedSource) and sample:
            rows = round(kept / len(sample) * len(source))
        if self.max_rows is not None:
            budget = self.max_rows * self.documents.ranks
            rows = budget if rows is None else min(rows, budget)
        done, seconds, widest = 0, 0.0, 0
        work = [
            chunk.blocks.select(index)
            for chunk in chunks
            for index in model_batches(chunk.blocks, self.inference_batch_size, self.model.isolation)
        ]
        for place, blocks in enumerate(work[: batches + 1]):
            begun = time.perf_counter()
            activations, wanted, _ = run_model(self.model, blocks)
            for x in activations.values():
                x.index_select(0, wanted.to(x.device)).cpu()  # waits for the device
            if place or len(work) == 1:  # the first batch warms up
                seconds, done = seconds + time.perf_counter() - begun, done + len(wanted)
            widest = max(widest, sum(x.numel() * x.element_size() for x in activations.values()))
        return Plan(
            rows=rows,
            row_bytes=manifest.row_bytes,
            rows_per_second=done / seconds if seconds else float("nan"),
            memory=2 * shard_bytes + widest,
            ranks=self.documents.ranks,
        )
