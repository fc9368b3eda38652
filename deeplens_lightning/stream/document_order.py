"""Compute one rank's rows in the order of its documents, for extraction to a cache.

In: a frozen model and a rank's text. Out: numbered model batches of rows for a `ShardWriter`, each with the position to
compute it again from. Rows are not shuffled here: the reader of the cache shuffles them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor

from deeplens_lightning.disk.records import Count, RecordError
from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.model.rows import run_model
from deeplens_lightning.shards.errors import DamagedShardError
from deeplens_lightning.shards.format import DTYPES, Manifest, Resume, Rows
from deeplens_lightning.shards.writer import SHARD_BYTES
from deeplens_lightning.stream.earlier_states import from_version_1
from deeplens_lightning.text.packing import Chunk, model_batches
from deeplens_lightning.text.pipeline import TextStage
from deeplens_lightning.text.sources import IndexedSource
from deeplens_lightning.types import Place, TextPosition

_SAMPLED_DOCUMENTS = 256


class ModelRows(NamedTuple):  # Lightning moves named tuples, and no other class, between devices
    """The rows of one model batch.

    Attributes:
        rows: `(n, d_in)` by canonical hook name, on the model's device.
        provenance: int64 `(n, 4)`, columns as in `types.PROVENANCE`.
        source: position to compute these rows again from, as JSON-like values.
        first_row: number of the first of these rows among all rows of this rank.
        tokens: number of tokens that the model read to compute these rows.
    """

    rows: dict[str, Tensor]
    provenance: Tensor
    source: dict[str, Any]
    first_row: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class _Source(Place):
    """Where the rows of a chunk are computed from: the `source` in sidecars.

    Attributes:
        start: position of the chunk; None for the start of the text.
        row: number of the chunk's first row among all rows of the rank.
    """

    start: TextPosition | None = None
    row: Count = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Size, time and memory of an extraction, estimated from a sample of its documents.

    Attributes:
        rows: number of rows over all ranks; None if the number of documents is unknown.
        row_bytes: bytes per row on disk.
        rows_per_second: rows per second on this rank.
        memory: bytes of memory that this rank needs besides the model: two shards and one model batch.
        ranks: number of ranks that share the work.
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
            "besides the model"
        )


@dataclass(kw_only=True)
class Extraction:
    """Iterate over the rows of all documents of a rank, in the order of the documents.

    Attributes:
        model: the frozen model.
        text: the text of this rank. It includes the held-out documents (`val_fraction=0`), so that a reader of the
            cache can split it by the same hashes as the text.
        inference_batch_size: blocks per model batch.
        identity: what determines the rows, from `row_identity`.
        config: further JSON-like settings that determine the rows.
        max_rows: stop after this number of rows of this rank; None for all rows.
        resume: where to begin, as returned by a `ShardWriter`; None if all rows were written before.
        exhausted: whether the last iteration came to its end.
    """

    model: FrozenModel
    text: TextStage
    inference_batch_size: int
    identity: Mapping[str, Any]
    config: Mapping[str, Any]
    max_rows: int | None = None
    resume: Resume | None = field(default_factory=lambda: Resume(None, 0, 0))
    exhausted: bool = False

    @property
    def rank(self) -> int:
        """Number of this rank."""
        return self.text.documents.rank

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self.text.documents.ranks

    def manifest(self, storage: str = "exact", extra: Mapping[str, Any] | None = None) -> Manifest:
        """Make the manifest of a cache of these rows.

        Args:
            storage: how rows are stored: `exact`, or `int8`.
            extra: further entries of the manifest, as JSON-like values.
        """
        names = {dtype: name for name, dtype in DTYPES.items()}
        documents = self.text.documents
        return Manifest(
            hook_points={
                point.name: Rows(d_in=point.d_in, dtype=names[self.model.dtypes[point.name]])
                for point in self.model.hook_points
            },
            storage=storage,
            config={
                **self.identity,
                "documents": {"seed": documents.seed, "max_rows": self.max_rows},
                **self.config,
            },
            world_size=documents.ranks,
            versions={name: version(name) for name in ("torch", "transformers", "datasets")},
            extra=extra or {},
        )

    def __iter__(self) -> Iterator[ModelRows]:
        self.exhausted = False
        if self.resume is not None:
            yield from self._rows(self.resume)
        self.exhausted = True

    def _rows(self, resume: Resume) -> Iterator[ModelRows]:
        at = _Source() if resume.source is None else _read_source(resume.source)
        start, number = at.start, at.row
        if start is not None:
            self.text.documents.check(start)
        for chunk in self.text.chunks(0, start):
            source = _Source(start=chunk.start, row=number).to_state()
            for index in model_batches(chunk.blocks, self.inference_batch_size, self.model.isolation):
                blocks = chunk.blocks.select(index)
                first, count = number, int(blocks.keep.sum())
                number += count
                if number <= resume.row:
                    continue  # written before: counted, not computed
                batch = run_model(self.model, blocks)
                if self.max_rows is not None:
                    fewer = max(0, self.max_rows - first)
                    batch = replace(batch, kept=batch.kept[:fewer], provenance=batch.provenance[:fewer])
                tokens = int((blocks.positions >= 0).sum())
                yield ModelRows(batch.rows(), batch.provenance, source, first, tokens)
                if self.max_rows is not None and number >= self.max_rows:
                    return

    def plan(self, storage: str = "exact", shard_bytes: int = SHARD_BYTES, batches: int = 4) -> Plan:
        """Estimate rows, bytes, time and memory from a few hundred documents and a few model batches.

        Args:
            storage: how rows are stored: `exact`, or `int8`.
            shard_bytes: size of a shard in bytes.
            batches: number of model batches that are timed.
        """
        manifest = self.manifest(storage)
        rows, chunks = self._sampled()
        done, seconds, widest = 0, 0.0, 0
        work = [
            chunk.blocks.select(index)
            for chunk in chunks
            for index in model_batches(chunk.blocks, self.inference_batch_size, self.model.isolation)
        ]
        for place, blocks in enumerate(work[: batches + 1]):
            begun = time.perf_counter()
            batch = run_model(self.model, blocks)
            for x in batch.rows().values():
                x.cpu()  # waits for the device
            if place or len(work) == 1:  # the first batch warms up
                seconds, done = seconds + time.perf_counter() - begun, done + len(batch.kept)
            widest = max(widest, sum(x.numel() * x.element_size() for x in batch.activations.values()))
        return Plan(
            rows=rows,
            row_bytes=manifest.row_bytes,
            rows_per_second=done / seconds if seconds else float("nan"),
            memory=2 * shard_bytes + widest,
            ranks=self.ranks,
        )

    def expected_rows(self) -> int | None:
        """Estimate the number of rows over all ranks from a few hundred documents; None if nothing limits it."""
        return self._sampled()[0]

    def _sampled(self) -> tuple[int | None, list[Chunk]]:
        """The estimated number of rows over all ranks, and chunks of a few hundred documents."""
        full = (document for document in self.text.tokenized(0) if len(document.tokens))
        sample = list(islice(full, _SAMPLED_DOCUMENTS))
        chunks: list[Chunk] = list(self.text.packing.chunks(sample))
        source, rows = self.text.documents.source, None
        if isinstance(source, IndexedSource) and sample:
            kept = sum(int(chunk.blocks.keep.sum()) for chunk in chunks)
            rows = round(kept / len(sample) * len(source))
        if self.max_rows is not None:
            budget = self.max_rows * self.ranks
            rows = budget if rows is None else min(rows, budget)
        return rows, chunks


def _read_source(source: Any) -> _Source:
    """Read the `source` of a sidecar of this release or an earlier one.

    Raises:
        DamagedShardError: it is not one.
    """
    try:
        return _Source.from_state(from_version_1(source))
    except RecordError as error:
        raise DamagedShardError(
            f"the last sidecar of the cache does not say where to continue ({error}): copy it again, or delete it and "
            "its shard and run the extract command again"
        ) from error
