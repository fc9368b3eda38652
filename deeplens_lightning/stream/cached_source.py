"""Read activations from shards that were written before; no model and no text are loaded.

In: `DataSettings` with folders, globs, files or URLs of shards. Out: `CachedActivations` with streams, held-out rows,
statistics and a fingerprint: the same interface as that of `live_source`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deeplens_lightning.model.wrappers import unwrapped
from deeplens_lightning.normalization import Moments, Scaling
from deeplens_lightning.options import Shuffle
from deeplens_lightning.shards.catalog import Catalog, open_catalog
from deeplens_lightning.shards.format import DTYPES
from deeplens_lightning.shards.gather import chosen_hook_points
from deeplens_lightning.shards.in_memory import catalog_of
from deeplens_lightning.shards.local_copies import LocalCopies
from deeplens_lightning.shards.rowset import in_split
from deeplens_lightning.shards.shard_steps import EpochPlan
from deeplens_lightning.shards.shard_stream import ShardStream, Split
from deeplens_lightning.stream.automatic_sizes import validation_rows
from deeplens_lightning.stream.cached_hook_points import bare_hook, check_bare_names, check_model, chosen
from deeplens_lightning.stream.measured_statistics import ROWS, SAMPLE_EPOCH, Statistics
from deeplens_lightning.stream.settings import DataSettings
from deeplens_lightning.stream.validation_set import HeldOutRows
from deeplens_lightning.types import PROVENANCE, Placement

log = logging.getLogger(__name__)
_READ = 4096
"""Batch size in rows for reading statistics and the validation set."""


@dataclass(frozen=True)
class CachedSettings:
    """Find the shards and hook points to read, without reading rows.

    Attributes:
        given: the settings of the data module, with `shards`.
    """

    given: DataSettings

    @cached_property
    def catalog(self) -> Catalog:
        """The list of shards, with their sizes checked.

        Raises:
            ShardError: nothing is there, a shard is damaged, the shards do not belong together, or `layer` and
                `hook` do not name the rows of bare tensors.
        """
        shards, options = self.given.shards, self.given.cache_options
        assert shards is not None  # this class is used only with shards=
        if isinstance(shards, Tensor):
            catalog = catalog_of(shards, bare_hook(self.given))
        else:
            copies = LocalCopies(max_bytes=options.bytes, timeout=options.timeout)
            try:
                catalog = open_catalog(shards, bare_hook(self.given), copies)
            finally:
                copies.close()
        check_bare_names(catalog, self.given)
        return catalog

    @property
    def hf_model(self) -> str | PreTrainedModel | None:
        """The model that the rows were computed with, from the settings or else from the cache; None if in neither."""
        given = self.given.hf_model
        if given is not None:
            return given if isinstance(given, str) else unwrapped(given)
        models = [manifest.config.get("model", {}) for manifest in self.catalog.manifests.values()]
        return models[0].get("name") if models else None

    @cached_property
    def only(self) -> tuple[str, ...] | None:
        """Canonical names of the chosen hook points; None for all hook points of the cache, in the cache's order.

        Raises:
            ShardError: `layer` and `hook` name a hook point that is not in the cache.
        """
        if not self.catalog.manifests or (self.given.layer is None and self.given.hook is None):
            return None
        return chosen(list(self.catalog.hook_points), self.given.layer, self.given.hook)

    @property
    def widths(self) -> dict[str, int]:
        """Width of the rows, `d_in`, by canonical name of the hook point."""
        return {name: rows.d_in for name, rows in chosen_hook_points(self.catalog, self.only).items()}

    def prepare(self) -> None:
        """Check the settings; there is nothing to download."""
        self.check()

    def check(self) -> None:
        """Check the settings without reading rows.

        Raises:
            ShardError: no shard was found, a shard is damaged, the shards do not belong together, or they lack a hook
                point that was asked for.
        """
        _ = self.widths

    def open(self, placement: Placement) -> CachedActivations:
        """List the shards without reading rows, and compare their widths with those of the model that is named.

        Args:
            placement: rank and devices of this process.

        Raises:
            ValueError: as `check`, or the model has other widths or lacks a hook point.
        """
        self.check()
        check_model(self.widths, self.given)
        return CachedActivations(settings=self, placement=placement)


@dataclass(frozen=True, kw_only=True)
class CachedActivations:
    """Streams, validation rows and statistics from shards.

    Attributes:
        settings: the settings that were opened.
        placement: rank and devices of this process.
    """

    settings: CachedSettings
    placement: Placement

    @cached_property
    def heldout(self) -> HeldOutRows:
        """This rank's share of the validation set, read once and kept; empty if the cache has no held-out rows."""
        return self._held_out("val", "validation set", f"val_fraction={self.settings.given.val_fraction}")

    @cached_property
    def test(self) -> HeldOutRows:
        """This rank's share of the test set, read once and kept; empty if the cache has no test documents."""
        fraction = self.settings.given.text_options.test_fraction
        return self._held_out("test", "test set", f"text_options.test_fraction={fraction}")

    def stream(self, batch_size: int, statistics: Statistics, buffer_rows: int | None) -> ShardStream:
        """Open the stream of this rank's training batches.

        Args:
            batch_size: rows per batch.
            statistics: not used: rows are not filtered by their norm.
            buffer_rows: not used: there is no shuffle buffer.
        """
        del statistics, buffer_rows
        return self._stream("train", batch_size)

    def measure(self) -> Statistics:
        """Measure the normalisation on a sample of training rows, which is the same on every rank."""
        normalize, widths = self.settings.given.normalize, self.settings.widths
        if normalize == "none":
            identities = {name: Scaling.identity(d_in) for name, d_in in widths.items()}
            return Statistics(scalings=identities, max_norms={})
        shuffle = self.settings.given.cache_options.shuffle
        alone = replace(self.placement, rank=0, ranks=1)
        stream = self._stream(
            "train", _READ, shuffle="window" if shuffle == "none" else shuffle, as_rank=alone
        )
        moments = {name: Moments(d_in) for name, d_in in widths.items()}
        for batch in islice(stream.batches(stream.start(SAMPLE_EPOCH), 0), ROWS // _READ):
            for name, rows in batch.rows.items():
                moments[name].update(rows)
        stream.close()
        scalings = {name: each.scaling(normalize) for name, each in moments.items()}
        return Statistics(scalings=scalings, max_norms={})

    def heldout_blocks(self, rows: int) -> None:  # noqa: ARG002
        """None, because shards contain rows and no text."""
        return

    def known_batches(self, batch_size: int) -> int:
        """Number of batches of an epoch, the same on every rank."""
        return EpochPlan.of(self._rows_in("train"), batch_size, self.placement.ranks).steps

    def fingerprint(self) -> dict[str, str]:
        """What must be the same when a run continues from a checkpoint: name to value."""
        given = self.settings.given
        return {
            "shards": self._digest,
            "hook points": ", ".join(self.settings.widths),
            "shuffle": given.cache_options.shuffle,
            "val_fraction": str(given.val_fraction),
            **{name: str(value) for name, value in given.test_documents.items()},
            "seed": str(given.seed),
        }

    def close(self) -> None:
        """Do nothing: each stream is closed by its user."""

    @cached_property
    def _digest(self) -> str:
        return self.settings.catalog.digest()

    def _rows_in(self, split: Split) -> int:
        """Number of rows of the documents of a split in the cache."""
        given = self.settings.given
        fractions = given.val_fraction, given.text_options.test_fraction
        return sum(
            int(shard.document_rows[in_split(shard.document_hashes, *fractions, split)].sum())
            for shard in self.settings.catalog.shards
        )

    def _held_out(self, split: Split, name: str, setting: str) -> HeldOutRows:
        """This rank's share of the rows of a split; empty, with a warning, if the cache has none.

        Args:
            split: the split.
            name: what the rows are, for the warning.
            setting: the setting that chooses their documents, for the warning.
        """
        if not self._rows_in(split):
            log.warning(
                "the shards hold no held-out documents at %s: there is no %s; raise it, or set it to 0",
                setting,
                name,
            )
            return self._allocated(0, 0)
        given, ranks = self.settings.given, self.placement.ranks
        points = chosen_hook_points(self.settings.catalog, self.settings.only).values()
        size = sum(kind.d_in * DTYPES[kind.dtype].itemsize for kind in points)
        most = validation_rows(given.val_rows, max_bytes=given.buffer_options.val_bytes, row_bytes=size)
        # Every rank takes its share of the same order, so that no row depends on the number of ranks.
        alone = replace(self.placement, rank=0, ranks=1, batch_device=torch.device("cpu"))
        stream = self._stream(split, _READ, max_rows=most, shuffle="none", as_rank=alone)
        longest = -(-stream.rows // ranks)
        first = min(stream.rows, self.placement.rank * longest)
        found = self._allocated(min(longest, stream.rows - first), longest)
        skipped = first // _READ
        at = skipped * _READ - first  # of the next batch, in this share
        for batch in stream.batches(stream.start(0), skipped):
            here = slice(max(0, at), at + len(batch.provenance))
            of_batch = slice(max(0, -at), max(0, len(found) - at))
            for hook, rows in batch.rows.items():
                found.rows[hook][here] = rows[of_batch]
            found.provenance[here] = batch.provenance[of_batch]
            at = here.stop
            if at >= len(found):
                break
        stream.close()
        return found

    def _allocated(self, count: int, longest: int) -> HeldOutRows:
        """Memory for `count` held-out rows, on the rank with most of them `longest`."""
        points = chosen_hook_points(self.settings.catalog, self.settings.only)
        return HeldOutRows(
            rows={
                name: torch.empty(count, kind.d_in, dtype=DTYPES[kind.dtype]) for name, kind in points.items()
            },
            provenance=torch.empty(count, len(PROVENANCE), dtype=torch.int64),
            longest=longest,
        )

    def _stream(
        self,
        split: Split,
        batch_size: int,
        *,
        max_rows: int | None = None,
        shuffle: Shuffle | None = None,
        as_rank: Placement | None = None,
    ) -> ShardStream:
        given, options = self.settings.given, self.settings.given.cache_options
        placement = as_rank or self.placement
        return ShardStream(
            self.settings.catalog,
            batch_size=batch_size,
            seed=given.seed,
            rank=placement.rank,
            world_size=placement.ranks,
            shuffle=shuffle or options.shuffle,
            split=split,
            val_fraction=given.val_fraction,
            test_fraction=given.text_options.test_fraction,
            max_rows=max_rows,
            hook=bare_hook(self.settings.given),
            only=self.settings.only,
            checksums=options.checksums,
            cache_dir=options.dir,
            cache_bytes=options.bytes,
            timeout=options.timeout,
            pin_memory=placement.batch_device.type == "cuda",
        )
