"""`ShardStream`: batches from shards, shuffled, split, dealt to ranks, resumable at any place at once.

A batch is gathered from the mapped shards at once, never collated row by row.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from deeplens_lightning.options import CACHE_BYTES, Shuffle
from deeplens_lightning.shards.catalog import Catalog, Shard, open_catalog
from deeplens_lightning.shards.errors import ShardError
from deeplens_lightning.shards.gather import Gatherer, chosen_hook_points, shard_starts
from deeplens_lightning.shards.order import GlobalOrder, Order, WindowOrder
from deeplens_lightning.shards.paths import Source
from deeplens_lightning.shards.remote import LocalCopies
from deeplens_lightning.shards.rowset import split_rows
from deeplens_lightning.types import Served

Split = Literal["train", "val", "all"]

_POSITION = ("epoch", "start", "world_size", "batch_size", "shuffle", "window_bytes")


class ShardStream:
    """Batches of cached activations.

    Args:
        sources: folders that `extract` wrote, bare `.pt` tensors, globs; local or fsspec URLs; or a `Catalog`
            of them.
        batch_size: rows per batch (of each rank).
        seed: of the shuffle; every epoch has an order of its own.
        rank: whose batches these are, below `world_size`. All ranks walk through one common order and
            take turns at its batches, so they are disjoint and end at the same step.
        world_size: how many ranks take turns.
        shuffle: `global` (all rows at once), `window` (some random shards at a time, for caches larger
            than memory), `none`, or `auto`: global where the cache fits in half of this machine's memory
            (and in `cache_bytes`, if it is remote), else window.
        split: `train`, `val` or `all`. Documents go by the hash of their text (see `heldout`); bare
            tensors, which do not know their documents, by stretches of up to 1024 neighbouring rows.
        val_fraction: fraction of the documents that is held out.
        max_rows: serve only the documents with the lowest hashes, up to so many rows.
        hook: hook name for bare tensors.
        only: serve these hook points of those in the cache, in this order; default all.
        window_bytes: size of a window; default an eighth of this machine's memory.
        drop_last: leave out the smaller batch at the end.
        checksums: check every local shard's checksum when it is first read (remote ones always are).
        cache_dir: where copies of remote shards go; by default a temporary folder.
        cache_bytes: bound on those copies.

    Attributes:
        hook_points: `Rows` by canonical hook name.
        d_in: width by canonical hook name.
        rows: how many rows the split has.
        identity: JSON-able description for a checkpoint's fingerprint.

    Raises:
        ShardError: the sources are not what they should be, or the split has fewer rows than ranks.
    """

    def __init__(
        self,
        sources: Source | Iterable[Source] | Catalog,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: Shuffle = "auto",
        split: Split = "train",
        val_fraction: float = 0.0,
        max_rows: int | None = None,
        hook: str | None = None,
        only: Sequence[str] | None = None,
        window_bytes: int | None = None,
        drop_last: bool = False,
        checksums: bool = False,
        cache_dir: str | Path | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        if shuffle not in get_args(Shuffle):
            raise ValueError(f"shuffle={shuffle!r} is unknown; choose one of {', '.join(get_args(Shuffle))}")
        if split not in get_args(Split):
            raise ValueError(f"split={split!r} is unknown; choose one of {', '.join(get_args(Split))}")
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"batch_size {batch_size}, rank {rank} of {world_size}: nothing to serve")
        copies = Path(cache_dir) / f"rank{rank}" if cache_dir is not None else None
        self._copies = LocalCopies(copies, cache_bytes)
        self.catalog = sources if isinstance(sources, Catalog) else open_catalog(sources, hook, self._copies)
        self.hook_points = chosen_hook_points(self.catalog, only)
        self.d_in = {name: rows.d_in for name, rows in self.hook_points.items()}
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self._seed, self._drop_last = seed, drop_last
        shards = self.catalog.shards
        hashes = np.concatenate([shard.document_hashes for shard in shards])
        lengths = np.concatenate([shard.document_rows for shard in shards])
        self._rows = split_rows(hashes, lengths, val_fraction, split, max_rows)
        self.rows = len(self._rows)
        self._counts = np.diff(self._rows.count_below(shard_starts(shards)))
        self._sizes = np.array([shard.nbytes for shard in shards], np.int64)
        self._near: list[list[int]] = []
        self._gatherer = Gatherer(self.catalog, self.hook_points, self._copies, hook, checksums)
        self._shuffle, self._window_bytes = self._choose(shuffle, window_bytes)
        self.identity: dict[str, Any] = {
            "shards": _digest(shards),
            "hook_points": {name: [rows.d_in, rows.dtype] for name, rows in self.hook_points.items()},
            "rows": {"split": split, "val_fraction": val_fraction, "max_rows": max_rows, "count": self.rows},
            "seed": seed,
        }
        if self.rows < world_size:
            raise ShardError(
                f"the {split} split has {self.rows} of {self.catalog.rows} rows (val_fraction={val_fraction})"
                f" for {world_size} rank(s): choose another val_fraction, or extract more documents"
            )

    def start(self, epoch: int = 0) -> dict[str, Any]:
        """The position at the start of an epoch.

        It also fixes the kind of shuffle, so that resuming does not depend on the machine's memory;
        ranks on machines of different memory should share rank 0's.
        """
        values = (epoch, 0, self.world_size, self.batch_size, self._shuffle, self._window_bytes)
        return dict(zip(_POSITION, values, strict=True))

    def steps(self, position: dict[str, Any] | None = None) -> int:
        """How many batches follow `position` in its epoch, on every rank; by default in a whole epoch."""
        return self._plan(self._whole(position)).steps

    def left_out(self, position: dict[str, Any] | None = None) -> int:
        """How many rows after `position` no rank serves in its epoch, because ranks serve equally many."""
        plan = self._plan(self._whole(position))
        return plan.rows - self.world_size * (plan.full * self.batch_size + plan.tail)

    def dropped(self, position: dict[str, Any], epoch_batches: int) -> int:
        """How many rows this rank still has after so many batches; all ranks have equally many."""
        plan = self._plan(self._whole(position))
        return max(0, plan.full * self.batch_size + plan.tail - epoch_batches * self.batch_size)

    def batches(self, position: dict[str, Any] | None, skip: int) -> Iterator[Served]:
        """Batches after the first `skip` ones that follow `position`, to the end of the epoch.

        Args:
            position: from `start`, from a `Served`, or from `rescaled`; None is `start(0)`, and
                `{"epoch": 3}` alone is `start(3)`.
            skip: the `step` of the last batch that was used.

        Raises:
            ShardError: the position was taken with another batch size or number of ranks.
        """
        position = self._whole(position)
        plan, order = self._plan(position), self._order(position)
        for step in range(skip, plan.steps):
            places = plan.places(step, self.rank, self.world_size, self.batch_size)
            self._prepare(order, int(places[0]))
            rows, provenance = self._gatherer.take(self._rows[order[places]])
            yield Served(
                rows=rows,
                provenance=provenance,
                certain=plan.steps - step,
                certain_rows=plan.full * self.batch_size + plan.tail - step * self.batch_size,
                position=position,
                step=step + 1,
            )

    def rescaled(self, table: Sequence[tuple[dict[str, Any], int, int]]) -> tuple[dict[str, Any], int]:
        """Go on with another number of ranks or another batch size.

        Args:
            table: of every old rank: a position, and the batches and rows served since.

        Returns:
            A position for every new rank, and how many rows are served again: none, unless the old ranks
            had gone unequally far.
        """
        position = table[0][0]
        served = [rows for _, _, rows in table]
        start = position["start"] + min(served) * position["world_size"]
        changed = {"start": start, "world_size": self.world_size, "batch_size": self.batch_size}
        return {**position, **changed}, sum(served) - len(served) * min(served)

    def close(self) -> None:
        """Let go of files and local copies."""
        self._gatherer.close()
        self._copies.close()

    def _choose(self, shuffle: Shuffle, window_bytes: int | None) -> tuple[str, int]:
        """The kind of shuffle and the size of its windows."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**33
        remote = sum(shard.nbytes for shard in self.catalog.shards if shard.folder.path is None)
        window = window_bytes or memory // 8
        if remote:
            window = min(window, self._copies.max_bytes // 3)  # this one, the next, and one on its way out
        if shuffle == "global" and remote > self._copies.max_bytes:
            raise ShardError(
                f"shuffle='global' needs all {remote:,} bytes of remote shards at hand, cache_bytes allows "
                f"{self._copies.max_bytes:,}: raise it, or use shuffle='window'"
            )
        if shuffle == "auto":
            fits = self.catalog.nbytes <= memory // 2 and remote <= self._copies.max_bytes
            shuffle = "global" if fits and window_bytes is None else "window"
        return shuffle, window

    def _whole(self, position: dict[str, Any] | None) -> dict[str, Any]:
        """A position with everything that an epoch alone leaves open."""
        return self.start(**(position or {})) if set(position or ()) <= {"epoch"} else dict(position or {})

    def _order(self, position: dict[str, Any]) -> Order:
        if position["shuffle"] == "global":
            return GlobalOrder(self.rows, self._seed, position["epoch"])
        window = position["window_bytes"] if position["shuffle"] == "window" else None
        return WindowOrder(self._counts, self._sizes, window, self._seed, position["epoch"])

    def _plan(self, position: dict[str, Any]) -> _Plan:
        if set(position) != set(_POSITION):
            raise ShardError(f"a position in shards has {', '.join(_POSITION)}, got {', '.join(position)}")
        for name, here in (("world_size", self.world_size), ("batch_size", self.batch_size)):
            if position[name] != here:
                raise ShardError(
                    f"the position was taken with {name}={position[name]}, this stream has {here}: "
                    "convert it with `rescaled`"
                )
        rows = self.rows - position["start"]
        full, left = divmod(rows, self.batch_size * self.world_size)
        return _Plan(position["start"], rows, full, 0 if self._drop_last else left // self.world_size)

    def _prepare(self, order: Order, place: int) -> None:
        """Have the shards around a place at hand or on their way, and let go of others."""
        windows = order.shards(place)
        if windows != self._near:
            self._near = windows
            self._gatherer.move_to([number for window in windows for number in window])


@dataclass(frozen=True, slots=True)
class _Plan:
    """The batches from a start to the end of an epoch: `full` ones, then one of `tail` rows, if any."""

    start: int
    rows: int
    full: int
    tail: int

    @property
    def steps(self) -> int:
        return self.full + bool(self.tail)

    def places(self, step: int, rank: int, world_size: int, batch_size: int) -> NDArray[np.int64]:
        """Places in the epoch's order of a rank's batch."""
        size = batch_size if step < self.full else self.tail
        first = self.start + step * world_size * batch_size + rank * size
        return np.arange(first, first + size)


def _digest(shards: Sequence[Shard]) -> str:
    """A short name for exactly these shards in this order."""
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(f"{shard.file} {shard.rows} {shard.sha256 or shard.nbytes}\n".encode())
    return digest.hexdigest()[:16]
