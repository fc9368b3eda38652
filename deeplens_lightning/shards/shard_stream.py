"""`ShardStream`: read a cache in shuffled batches, split, shared among ranks, resumable from any batch.

In: paths of shards and a position. Out: one `Served` after another. Rows are gathered in whole batches from memory-mapped
shards, never one by one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from deeplens_lightning.options import CACHE_BYTES, TIMEOUT, Shuffle
from deeplens_lightning.shards.catalog import Catalog, open_catalog
from deeplens_lightning.shards.epoch_orders import EpochOrders, stretches
from deeplens_lightning.shards.errors import ShardError
from deeplens_lightning.shards.folder import LocalFolder
from deeplens_lightning.shards.gather import Gatherer, chosen_hook_points
from deeplens_lightning.shards.local_copies import LocalCopies
from deeplens_lightning.shards.paths import ShardPath
from deeplens_lightning.shards.rowset import split_rows
from deeplens_lightning.shards.shard_steps import EpochPlan, ShardSteps
from deeplens_lightning.types import SHARD_ORDER, RankProgress, Served, ShardPosition, Stream, StreamPosition

Split = Literal["train", "val", "test", "all"]
ShuffleKind = Literal["global", "window", "none"]
WINDOWS_KEPT = 6
"""Windows that local copies of remote shards have room for: this one and the next, with up to three times the bytes of
their rows. A stretch of `n` rows overlaps shards of at most `n` rows each, of which the first and the last may lie
outside but for one row."""


class ShardStream(Stream):
    """Batches of cached activations for one rank.

    Documents are split by the hash of their text (see `heldout`). Bare tensors have no documents: they are split by
    stretches of up to 1024 neighbouring rows.

    Args:
        paths: folders that `extract` wrote, bare `.pt` tensors, globs; local or fsspec URLs; or a `Catalog` of them.
        batch_size: rows in a batch of each rank.
        seed: seed of the shuffle. Every epoch has another order.
        rank: number of the rank that gets the batches, below `world_size`. All ranks follow one common order, whose
            batches go to them in turn, so their batches are disjoint and their epochs end at the same step.
        world_size: number of ranks that take turns.
        shuffle: `global` (all rows at once), `window` (some random stretches of consecutive rows at a time, for caches
            larger than memory), `none`, or `auto`: `global` if the cache takes at most half of this machine's memory (and
            at most `cache_bytes`, if it is remote), else `window`.
        split: `train`, `val`, `test` or `all`.
        val_fraction: fraction of the documents that is held out for validation.
        test_fraction: fraction of the documents that is held out for the test.
        max_rows: serve at most this number of rows, from the documents with the lowest hashes.
        hook: hook name for bare tensors (default: from DeepLens's file names, else `activations`).
        only: canonical names of the hook points to serve, in this order; default all in the cache.
        window_bytes: size of a window in bytes; default an eighth of this machine's memory, for remote shards at most a
            sixth of `cache_bytes`.
        drop_last: leave out the smaller batch at the end of an epoch.
        checksums: compare every local shard with its checksum when it is first read (remote ones always are).
        cache_dir: folder for copies of remote shards; by default a temporary folder.
        cache_bytes: limit on those copies, in bytes, for all ranks and runs that use `cache_dir` together.
        timeout: seconds without a byte after which a server is given up.
        pin_memory: serve batches in pinned memory, from which a CUDA device copies asynchronously; ordinary memory if
            torch finds no CUDA device.

    Attributes:
        catalog: the shards.
        hook_points: `Rows` by canonical hook name.
        d_in: width by canonical hook name.
        rows: number of rows in the split.
        batch_size: as given.
        rank: as given.
        world_size: as given.
        identity: shards, hook points, split and seed as JSON values, for a checkpoint's fingerprint.

    Raises:
        ShardError: there are no rows, the shards do not belong together, or the split has fewer rows than ranks.
        DamagedShardError: a file is missing or has another size than its sidecar says.
        ValueError: an argument has a value that is not allowed.
    """

    def __init__(
        self,
        paths: ShardPath | Iterable[ShardPath] | Catalog,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: Shuffle = "auto",
        split: Split = "train",
        val_fraction: float = 0.0,
        test_fraction: float = 0.0,
        max_rows: int | None = None,
        hook: str | None = None,
        only: Sequence[str] | None = None,
        window_bytes: int | None = None,
        drop_last: bool = False,
        checksums: bool = False,
        cache_dir: str | Path | None = None,
        cache_bytes: int = CACHE_BYTES,
        timeout: float = TIMEOUT,
        pin_memory: bool = False,
    ) -> None:
        if shuffle not in get_args(Shuffle):
            raise ValueError(f"shuffle={shuffle!r} is unknown; choose one of {', '.join(get_args(Shuffle))}")
        if split not in get_args(Split):
            raise ValueError(f"split={split!r} is unknown; choose one of {', '.join(get_args(Split))}")
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                "batch_size must be at least 1 and rank between 0 and world_size - 1, got "
                f"batch_size={batch_size}, rank={rank}, world_size={world_size}"
            )
        copies = Path(cache_dir) if cache_dir is not None else None
        self._copies = LocalCopies(copies, cache_bytes, timeout)
        self.catalog = paths if isinstance(paths, Catalog) else open_catalog(paths, hook, self._copies)
        self.hook_points = chosen_hook_points(self.catalog, only)
        self.d_in = {name: rows.d_in for name, rows in self.hook_points.items()}
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self._drop_last = drop_last
        shards = self.catalog.shards
        hashes = np.concatenate([shard.document_hashes for shard in shards])
        lengths = np.concatenate([shard.document_rows for shard in shards])
        split_set = split_rows(hashes, lengths, val_fraction, split, max_rows, test_fraction)
        self.rows = len(split_set)
        self._orders = EpochOrders(catalog=self.catalog, split=split_set, seed=seed)
        self._stretch_rows = self.catalog.stretch_rows
        pinned = pin_memory and torch.cuda.is_available()
        self._gatherer = Gatherer(
            self.catalog, self.hook_points, split_set, self._copies, hook, checksums, pinned
        )
        self._shuffle, self._window_bytes = self._choose(shuffle, window_bytes)
        self.identity: dict[str, Any] = {
            "shards": self.catalog.digest(),
            "hook_points": {name: [rows.d_in, rows.dtype] for name, rows in self.hook_points.items()},
            "rows": {"split": split, "val_fraction": val_fraction, "max_rows": max_rows, "count": self.rows}
            | ({"test_fraction": test_fraction} if test_fraction else {}),
            "seed": seed,
        }
        if self.rows < world_size:
            raise ShardError(
                f"the {split} split has {self.rows} of {self.catalog.rows} rows (val_fraction={val_fraction})"
                f" for {world_size} rank(s): choose another val_fraction, or extract more documents"
            )

    @property
    def buffer_rows(self) -> None:
        """None: rows are shuffled by the order in which they are read, without a buffer."""
        return None

    @property
    def counts(self) -> Mapping[str, int]:
        """Empty: nothing is counted."""
        return {}

    def start(self, epoch: int = 0) -> ShardPosition:
        """The position at which an epoch begins.

        It holds the kind of shuffle and the window size, so that resuming does not depend on a machine's memory. Ranks
        on machines with different memory should all use the position of rank 0.
        """
        return ShardPosition(
            epoch=epoch,
            start=0,
            world_size=self.world_size,
            batch_size=self.batch_size,
            shuffle=self._shuffle,
            window_bytes=self._window_bytes,
            order=SHARD_ORDER,
            stretch_rows=self._stretch_rows,
        )

    def steps(self, position: ShardPosition | None = None) -> int:
        """Number of batches of each rank after `position` in its epoch; by default in a whole epoch."""
        return self._plan(self.start() if position is None else position).steps

    def left_out(self, position: ShardPosition | None = None) -> int:
        """Rows after `position` in its epoch (by default a whole epoch) that no rank serves.

        These are the rows that cannot be shared equally among the ranks, and those of the last batch with `drop_last`.
        """
        plan = self._plan(self.start() if position is None else position)
        return plan.rows - self.world_size * plan.rank_rows

    def dropped(self, position: StreamPosition, epoch_batches: int) -> int:
        """Rows that this rank has after `position` beyond the first `epoch_batches` batches; the same on all ranks.

        Raises:
            ShardError: the position is of a live stream, another batch size, or another number of ranks.
        """
        return max(0, self._plan(_in_shards(position)).rank_rows - epoch_batches * self.batch_size)

    def batches(self, position: StreamPosition, skip: int) -> Iterator[Served]:
        """Batches after the first `skip` ones that follow `position`, to the end of the epoch.

        Args:
            position: from `start`, from a `Served`, or from `rescaled`.
            skip: the `step` of the last batch that was used; 0 for none.

        Raises:
            ShardError: the position is of a live stream, another batch size, or another number of ranks, or `checked`
                refuses it.
            DamagedShardError: a shard is missing or damaged.
        """
        here = self.checked(position, skip)
        steps = ShardSteps(
            here,
            plan=self._plan(here),
            order=self._orders.order(here),
            gatherer=self._gatherer,
            rank=self.rank,
        )
        yield from map(steps.__getitem__, range(skip, len(steps)))

    def checked(self, position: StreamPosition, step: int, *, anyway: bool = False) -> ShardPosition:
        """Check that a position lies in this cache and that the batches after it can be served again.

        Args:
            position: a position of any number of ranks and any batch size.
            step: number of batches already served from there.
            anyway: accept a position whose order has changed since.

        Returns:
            The position, in the present version of the order.

        Raises:
            ShardError: the position is of a live stream, beyond the rows of the split, or in the middle of an epoch whose
                order has changed since.
        """
        here = _in_shards(position)
        left = self.rows - here.start
        steps = EpochPlan.of(max(left, 0), here.batch_size, here.world_size, self._drop_last).steps
        if left < 0 or step > steps:
            raise ShardError(
                f"the position of the checkpoint is {here.start:,} rows and {step:,} batches into an epoch, which has "
                f"{self.rows:,} rows here: take another checkpoint, or the cache that this one was taken with"
            )
        if here.order == SHARD_ORDER:
            return here
        present = replace(here, order=SHARD_ORDER, stretch_rows=self._stretch_rows)
        if step < steps and not anyway and not self._orders.same_in_version_1(present):
            raise ShardError(
                "the checkpoint was taken in the middle of an epoch by a release that read this cache in another order, "
                "so rows would be served twice and others not at all. Continue with that release to the end of the "
                "epoch, take a checkpoint from the end of an epoch, or give resume_anyway=True to accept it"
            )
        return present

    def rescaled(self, table: Sequence[RankProgress]) -> tuple[ShardPosition, int]:
        """Continue with another number of ranks or another batch size.

        Args:
            table: the progress of every old rank.

        Returns:
            A position for every new rank, and the number of rows that are served again: 0 unless the old ranks had
            served different numbers of rows.

        Raises:
            ShardError: the positions are of a live stream.
        """
        position = _in_shards(table[0].position)
        served = [progress.rows for progress in table]
        start = position.start + min(served) * position.world_size
        again = sum(served) - len(served) * min(served)
        return replace(position, start=start, world_size=self.world_size, batch_size=self.batch_size), again

    def row_age(self, position: StreamPosition, step: int) -> None:
        """None: rows are read, not computed."""

    def sync(self) -> None:
        """Do nothing: the shards are already on disk."""

    def close(self) -> None:
        """Close the shards, and delete temporary local copies."""
        self._gatherer.close()
        self._copies.close()

    def _choose(self, shuffle: Shuffle, window_bytes: int | None) -> tuple[ShuffleKind, int]:
        """The kind of shuffle and the size of its windows in bytes."""
        memory = machine_memory()
        remote = sum(
            shard.nbytes for shard in self.catalog.shards if not isinstance(shard.folder, LocalFolder)
        )
        window = window_bytes or memory // 8
        if remote:
            window = max(min(window, self._copies.max_bytes // WINDOWS_KEPT), 1)
        if shuffle == "global" and remote > self._copies.max_bytes:
            raise ShardError(
                f"shuffle='global' needs local copies of all {remote:,} bytes of remote shards, and "
                f"{self._copies.max_bytes:,} bytes are allowed: raise cache_options.bytes (cache_bytes= of ShardStream), "
                "or use shuffle='window'"
            )
        if shuffle == "auto":
            size = int(stretches(self.catalog, self._stretch_rows)[1].sum())
            fits = size <= memory // 2 and remote <= self._copies.max_bytes
            return ("global" if fits and window_bytes is None else "window"), window
        return shuffle, window

    def _plan(self, position: ShardPosition) -> EpochPlan:
        for name, there, here in (
            ("world_size", position.world_size, self.world_size),
            ("batch_size", position.batch_size, self.batch_size),
        ):
            if there != here:
                raise ShardError(
                    f"the position was taken with {name}={there}, this stream has {name}={here}: convert it with "
                    "`ShardStream.rescaled`"
                )
        rows = self.rows - position.start
        return EpochPlan.of(rows, self.batch_size, self.world_size, self._drop_last)


def _in_shards(position: StreamPosition) -> ShardPosition:
    """Check that a position is one in a cache."""
    if not isinstance(position, ShardPosition):
        raise ShardError(
            "the position was taken in a live stream and this stream reads shards: give a position from "
            "`ShardStream.start`, or continue with the model and dataset that the run was started with"
        )
    return position


def machine_memory() -> int:
    """This machine's memory in bytes; on Windows, where Python cannot read it, 8 GiB."""
    if sys.platform == "win32":
        return 2**33
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
