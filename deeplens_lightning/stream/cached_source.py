"""Cached activations: what a data module needs of shards, where `live.py` has it of a model and text.

In: folders, globs, files or URLs of shards. Out: streams, held-out rows, statistics, a fingerprint. No model
and no text are loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from deeplens_lightning.normalization import Moments, Normalize, Scaling
from deeplens_lightning.options import CACHE_BYTES, Shuffle
from deeplens_lightning.shards.catalog import Catalog, open_catalog
from deeplens_lightning.shards.format import DTYPES
from deeplens_lightning.shards.gather import chosen_hook_points
from deeplens_lightning.shards.local_copies import LocalCopies
from deeplens_lightning.shards.rowset import split_rows
from deeplens_lightning.shards.shard_stream import ShardStream, Split
from deeplens_lightning.stream.measured_statistics import ROWS, SAMPLE_EPOCH, Statistics
from deeplens_lightning.types import Placement

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class CachedActivations:
    """Configuration of cached activations, and what was opened of it.

    Attributes:
        shards: folders that `extract` wrote, bare `.pt` tensors, globs; local or fsspec URLs.
        only: canonical names of the hook points to serve; default all in the cache.
        bare_hook: hook name for bare tensors; default from DeepLens's file names, else `activations`.
        shuffle: see `ShardStream`.
        window_bytes: size of a shuffle window; default an eighth of this machine's memory.
        checksums: check every shard when it is first read.
        cache_dir: where copies of remote shards go; by default a temporary folder.
        cache_bytes: bound on those copies.
        seed: of the shuffle.
        val_fraction: share of documents held out, by the hash of their text.
        val_rows: held-out rows of the validation set.
    """

    shards: str | PathLike[str] | Sequence[str | PathLike[str]]
    only: Sequence[str] | None = None
    bare_hook: str | None = None
    shuffle: Shuffle = "auto"
    window_bytes: int | None = None
    checksums: bool = False
    cache_dir: str | Path | None = None
    cache_bytes: int = CACHE_BYTES
    seed: int = 0
    val_fraction: float = 0.05
    val_rows: int = 65_536

    model: None = field(init=False, default=None)
    tokenizer: None = field(init=False, default=None)
    site: Placement | None = field(init=False, default=None)
    validation: tuple[dict[str, Tensor], Tensor] | None = field(init=False, default=None)

    @cached_property
    def catalog(self) -> Catalog:
        """The shards, listed and their sizes checked."""
        copies = LocalCopies(max_bytes=self.cache_bytes)
        try:
            return open_catalog(self.shards, self.bare_hook, copies)
        finally:
            copies.close()

    @property
    def widths(self) -> dict[str, int]:
        """d_in by hook point."""
        return {name: rows.d_in for name, rows in chosen_hook_points(self.catalog, self.only).items()}

    def prepare(self) -> None:
        """Find mistakes; there is nothing to download."""
        self.check()

    def check(self) -> None:
        """Find what is wrong without reading a shard.

        Raises:
            ShardError: nothing there, or what is there is damaged or does not belong together.
        """
        _ = self.widths

    def open(self, site: Placement) -> None:
        """Look at what there is; a second call only moves."""
        self.check()
        self.site = site

    def stream(self, batch_size: int, statistics: Statistics, buffer_rows: int | None) -> ShardStream:
        """This rank's training batches; shards need no buffer."""
        del buffer_rows
        if statistics.max_norms:
            raise ValueError("max_norm_ratio filters live activations; with shards, leave it out")
        return self._stream("train", batch_size)

    def known_batches(self, batch_size: int) -> int:
        """Batches of an epoch, on every rank."""
        stream = self._stream("train", batch_size)
        try:
            return stream.steps()
        finally:
            stream.close()

    def measure(self, normalize: Normalize, max_norm_ratio: float | None) -> Statistics:
        """Normalisation from a sample of training rows, the same on every rank."""
        if max_norm_ratio is not None:
            raise ValueError("max_norm_ratio filters live activations; with shards, leave it out")
        if normalize == "none":
            identities = {name: Scaling.identity(d_in) for name, d_in in self.widths.items()}
            return Statistics(scalings=identities, max_norms={})
        size = 4096
        shuffle: Shuffle = "window" if self.shuffle == "none" else self.shuffle
        stream = self._stream("train", size, shuffle=shuffle, rank=0, ranks=1)
        moments = {name: Moments(d_in) for name, d_in in self.widths.items()}
        for batch in islice(stream.batches({"epoch": SAMPLE_EPOCH}, 0), ROWS // size):
            for name, rows in batch.rows.items():
                moments[name].update(rows)
        stream.close()
        return Statistics(
            scalings={name: each.scaling(normalize) for name, each in moments.items()}, max_norms={}
        )

    def heldout_rows(self) -> tuple[dict[str, Tensor], Tensor]:
        """This rank's validation rows: raw `(n, d_in)` by hook point, and provenance `(n, 4)`; read once."""
        if self.validation is None:
            self.validation = self._read_validation()
        return self.validation

    def _read_validation(self) -> tuple[dict[str, Tensor], Tensor]:
        site = self._opened()
        points = chosen_hook_points(self.catalog, self.only)
        rows = {name: torch.empty(0, kind.d_in, dtype=DTYPES[kind.dtype]) for name, kind in points.items()}
        provenance = torch.empty(0, 4, dtype=torch.int64)
        if self._heldout_count() < site.ranks:
            log.warning("the shards hold no held-out documents at val_fraction=%s", self.val_fraction)
            return rows, provenance
        stream = self._stream("val", 4096, max_rows=self.val_rows, shuffle="none")
        batches = list(stream.batches(None, 0))
        stream.close()
        rows = {name: torch.cat([batch.rows[name] for batch in batches]) for name in points}
        return rows, torch.cat([batch.provenance for batch in batches])

    def heldout_blocks(self, rows: int) -> None:
        """None: shards hold rows, not text."""

    def fingerprint(self) -> dict[str, str]:
        """What must not change when a run goes on."""
        stream = self._stream("train", 1)
        identity = stream.identity
        stream.close()
        return {
            "shards": identity["shards"],
            "hook points": ", ".join(self.widths),
            "shuffle": self.shuffle,
            "val_fraction": str(self.val_fraction),
            "seed": str(self.seed),
        }

    @property
    def is_open(self) -> bool:
        """Whether `open` was called, and `close` not since."""
        return self.site is not None

    def close(self) -> None:
        """Let go of the validation rows; streams close themselves."""
        self.site = self.validation = None

    def _heldout_count(self) -> int:
        shards = self.catalog.shards
        counts = [
            len(split_rows(shard.document_hashes, shard.document_rows, self.val_fraction, "val"))
            for shard in shards
        ]
        return sum(counts)

    def _stream(
        self,
        split: Split,
        batch_size: int,
        *,
        max_rows: int | None = None,
        shuffle: Shuffle | None = None,
        rank: int | None = None,
        ranks: int | None = None,
    ) -> ShardStream:
        site = self._opened()
        return ShardStream(
            self.catalog,
            batch_size=batch_size,
            seed=self.seed,
            rank=site.rank if rank is None else rank,
            world_size=site.ranks if ranks is None else ranks,
            shuffle=self.shuffle if shuffle is None else shuffle,
            split=split,
            val_fraction=self.val_fraction,
            max_rows=max_rows,
            hook=self.bare_hook,
            only=self.only,
            window_bytes=self.window_bytes,
            checksums=self.checksums,
            cache_dir=self.cache_dir,
            cache_bytes=self.cache_bytes,
        )

    def _opened(self) -> Placement:
        if self.site is None:
            raise RuntimeError('the shards are not open: call setup("fit") on the data module first')
        return self.site
