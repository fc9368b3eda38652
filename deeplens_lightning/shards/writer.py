"""Write a cache: rows in, finished shards out, one writer per rank; a killed run can be continued.

Rows are numbered in the order in which a rank computes them. After a kill, the next writer with the same configuration
finds the finished shards, reports where to continue (`resume`), and skips rows that are already written. The shards then
hold the same rows in the same order as those of an uninterrupted run.

A background thread saves a full shard while the next one fills, so two shards are in memory. One thread may append rows
while another one calls `sync`: a lock lets one call run at a time.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from deeplens_lightning.disk.files import remove
from deeplens_lightning.options import TIMEOUT
from deeplens_lightning.shards.checksum import save_hashed
from deeplens_lightning.shards.errors import DiskFullError, NonFiniteError, ShardError
from deeplens_lightning.shards.folder import Folder, Lock
from deeplens_lightning.shards.format import Manifest, Resume
from deeplens_lightning.shards.frame import read_frame
from deeplens_lightning.shards.index import DoneMark, is_whole, read_manifest, write_index
from deeplens_lightning.shards.names import INDEX, MANIFEST, done_name, shard_name, sidecar_name
from deeplens_lightning.shards.open_folder import open_folder
from deeplens_lightning.shards.recover import (
    check_same_folder,
    delete_after,
    finished_shards,
    folder_lost,
    is_done,
)
from deeplens_lightning.shards.shard_buffer import ShardBuffer, check_rows
from deeplens_lightning.shards.sidecar import Sidecar

NonFinite = Literal["refuse", "drop"]
"""What to do with rows that hold NaN or infinity: raise an error, or leave them out and count them."""

SHARD_BYTES = 256 * 2**20
"""Default size of a shard in bytes: about a minute of computing on a laptop, a second of writing."""

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SLACK = 2**16  # bytes for a shard's zip directory and its sidecar


class ShardWriter:
    """Write one rank's rows of a cache.

    Several threads may use one writer: a call of `append`, `flush`, `sync`, `finish` or `close` waits until the call of
    another thread has ended, so `sync` saves whole batches. Batches must still be appended in order.

    Args:
        where: the cache's folder, a path or an fsspec URL.
        manifest: hook points, storage and configuration of the cache.
        rank: number of the rank of this writer, below `manifest.world_size`.
        shard_bytes: size of a shard in bytes.
        nonfinite: what to do with rows that hold NaN or infinity: `refuse` raises an error, `drop` leaves them out.
        expected_rows: number of rows that the rank will write, to check the free space first; None if not known.
        timeout: seconds without a byte after which a server is given up.

    Attributes:
        complete: whether every rank has finished and all shards exist, so that nothing is left to write.
        finished: whether this rank has finished.
        resume: where to continue, after the last finished shard.
        shards: number of finished shards of this rank.
        rows: number of rows in them.
        nbytes: their size in bytes.
        dropped: rows left out up to the end of the last finished shard because they held NaN or infinity.

    Raises:
        OtherConfigError: the folder holds a cache of another configuration.
        DamagedShardError: files in the folder are damaged, or do not agree with each other.
        ShardError: another process is writing to the folder, it holds other `.pt` files, another number of ranks started
            the cache, or it has an older format version.
        DiskFullError: there is not enough free space for `expected_rows`.
    """

    def __init__(
        self,
        where: str | Path,
        manifest: Manifest,
        *,
        rank: int = 0,
        shard_bytes: int = SHARD_BYTES,
        nonfinite: NonFinite = "refuse",
        expected_rows: int | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        if nonfinite not in get_args(NonFinite):
            raise ValueError(f"nonfinite={nonfinite!r} is unknown; choose 'refuse' or 'drop'")
        if not 0 <= rank < manifest.world_size:
            raise ValueError(
                f"rank must be between 0 and {manifest.world_size - 1} (manifest.world_size is {manifest.world_size}), "
                f"got {rank}"
            )
        self._folder: Folder = open_folder(where, f"rank{rank:05d}", timeout)
        self._manifest = manifest
        self._rank = rank
        self._nonfinite = nonfinite
        self._capacity = max(1, shard_bytes // manifest.row_bytes)
        self._filling: ShardBuffer | None = None
        self._spare: list[ShardBuffer] = []
        self._saving: Future[None] | None = None
        self._lock: Lock | None = None
        self._guard = RLock()  # `_save` must never take it: the thread that waits for `_save` holds it
        self.shards = self.rows = self.nbytes = self.dropped = 0
        self.resume = Resume(None, 0, 0)
        self.finished = False
        self.complete = self._begin()
        if not self.complete:
            self._lock = self._folder.lock(f".lock-rank{rank:05d}")
            try:
                self._recover()
                self._check_free_space(expected_rows)
            except BaseException:
                self._lock.release()
                raise
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="shard-writer")
        self._next, self._dropped = self.resume, self.dropped  # include rows not saved yet

    def append(self, rows: Mapping[str, Tensor], provenance: Tensor, *, source: Any, first_row: int) -> None:
        """Add a batch of rows.

        Args:
            rows: `(n, d_in)` by hook name, on any device, in the manifest's dtypes.
            provenance: int64 `(n, 4)`.
            source: JSON values that say from where these rows can be computed again; `resume.source` returns them.
            first_row: number of the batch's first row. Rows that are already written are skipped.

        Raises:
            NonFiniteError: a row holds NaN or infinity, and `nonfinite` is `refuse`.
            DiskFullError: there is no space for a shard.
            ShardError: the rank has finished, rows before `first_row` are missing, or hook points, shapes or dtypes
                are not those of the manifest.
        """
        with self._guard:
            if self.finished or self.complete:
                raise ShardError(
                    f"rank {self._rank} of {self._folder.where} is finished; nothing can be added to it"
                )
            check_rows(self._manifest, rows, len(provenance))
            if self._saving is not None and self._saving.done():
                self._wait()
            if self._next.row < first_row:
                raise ShardError(
                    f"rows {self._next.row} to {first_row - 1} of rank {self._rank} are not in the cache in "
                    f"{self._folder.where}, and a training that continues after them does not compute them again: "
                    "continue without write_shards (--data.write_shards null); for a cache of all rows start a "
                    "training without ckpt_path, or run deeplens-lightning extract"
                )
            keep = self._wanted(rows, provenance, seen=self._next.row - first_row)
            while len(keep):
                if self._filling is None:
                    self._filling = (
                        self._spare.pop() if self._spare else ShardBuffer(self._manifest, self._capacity)
                    )
                now, keep = keep[: self._filling.room], keep[self._filling.room :]
                self._filling.fill(rows, provenance, now)
                self._advance(source, first_row, int(now[-1]) + 1, kept=len(now))
                if not self._filling.room:
                    self.flush()
            self._advance(source, first_row, len(provenance), kept=0)

    def flush(self) -> None:
        """Start to save the rows in the buffer as a shard, however few they are; wait for the shard before it."""
        with self._guard:
            self._wait()
            if self._filling is not None and self._filling.filled:
                full, self._filling = self._filling, None
                self._saving = self._pool.submit(self._save, full, self._next, self._dropped)

    def sync(self) -> None:
        """Save every row appended so far and wait until they are on disk; call it before saving a checkpoint."""
        with self._guard:
            self.flush()
            self._wait()

    def finish(self) -> None:
        """Save the remaining rows and mark this rank as done; the last rank to finish also writes the index."""
        with self._guard:
            if not self.finished and not self.complete:
                self.sync()
                coming = done_name(self._rank)
                check_same_folder(self._folder, self._found, self._rank, self.shards, coming)
                mark = DoneMark(
                    shards=self.shards, rows=self.rows, dropped=self._dropped, manifest=self._found.identity
                )
                self._folder.write(coming, mark.dump())
                self.finished = True
            if not self.complete:
                self.complete = write_index(self._folder)
            self.close()

    def close(self) -> None:
        """Release the folder. Rows of an unfinished shard are lost and must be appended again after `resume`."""
        with self._guard:
            self._pool.shutdown(wait=True)
            self._filling = None
            self._spare.clear()
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self) -> bool:
        """Write the manifest, or compare it with the one in the folder; return whether the cache is complete."""
        sizes = self._folder.sizes()
        if MANIFEST not in sizes:
            if any(name.endswith(".pt") for name in sizes):
                raise ShardError(
                    f"{self._folder.where} has .pt files and no {MANIFEST}, so it is not a cache: choose another folder"
                )
            self._folder.create()
            self._folder.write(MANIFEST, replace(self._manifest, shard_rows=self._capacity).dump())
        self._found = found = read_manifest(self._folder, sizes)
        self._manifest.check_same(found, self._folder.where)
        if INDEX in sizes and is_whole(self._folder, sizes, found):
            return True
        if found.version == 1:
            raise ShardError(
                f"{self._folder.where} has format version 1 and is not finished; before it can be continued: "
                f"deeplens-lightning verify {self._folder.where} --upgrade"
            )
        if found.world_size != self._manifest.world_size:
            raise ShardError(
                f"{self._folder.where} was started by {found.world_size} rank(s) and is not finished: run with "
                f"{found.world_size} rank(s) instead of {self._manifest.world_size}, or choose another folder"
            )
        return False

    def _recover(self) -> None:
        """Count the finished shards of an earlier writer of this rank, and delete its other files."""
        sidecars = finished_shards(self._folder, self._rank, self._found)
        for sidecar in sidecars:
            self._count(sidecar)
        self.finished = is_done(self._folder, self._rank, sidecars, self._found)
        if not self.finished:
            delete_after(self._folder, self._rank, self.shards)

    def _count(self, sidecar: Sidecar) -> None:
        self.shards += 1
        self.rows += sidecar.rows
        self.nbytes += sidecar.nbytes
        self.dropped = sidecar.dropped
        self.resume = sidecar.next

    def _check_free_space(self, expected_rows: int | None) -> None:
        free = self._folder.free_bytes()
        if expected_rows is None or free is None or self.finished:
            return
        rows = max(0, expected_rows - self.rows)
        missing = rows * self._manifest.row_bytes - free
        if missing > 0:
            raise DiskFullError(
                f"{self._folder.where} has {free:,} bytes free, {rows:,} rows need {missing:,} bytes more: "
                "free some space, write fewer rows, or use storage='int8'",
                missing,
            )

    def _wanted(self, rows: Mapping[str, Tensor], provenance: Tensor, seen: int) -> Tensor:
        """Indices of the rows to write, int64 `(m,)`: without the first `seen` rows and without rows to drop."""
        new = torch.arange(min(seen, len(provenance)), len(provenance))
        if all(bool(batch.sum(dtype=torch.float32).isfinite()) for batch in rows.values()):
            return new  # one pass; if a sum overflows, the rows are checked below
        finite = torch.stack([torch.isfinite(batch).all(dim=1).cpu() for batch in rows.values()]).all(dim=0)
        bad = new[~finite[new]]
        if len(bad) and self._nonfinite == "refuse":
            document, _, position, token = provenance[int(bad[0])].tolist()
            raise NonFiniteError(
                f"{len(bad)} of {len(provenance)} rows hold NaN or infinity, first token {token} at position "
                f"{position} of the document with hash {document}: run the model in float32 or bfloat16, or "
                "pass nonfinite='drop' to leave such rows out"
            )
        return new[finite[new]]

    def _advance(self, source: Any, first_row: int, upto: int, kept: int) -> None:
        """Count a batch's rows before index `upto` as seen; `kept` of the new ones were kept, the others dropped."""
        new = first_row + upto - self._next.row
        if new > 0:
            self._dropped += new - kept
            self._next = Resume(source, first_row, first_row + upto)

    def _wait(self) -> None:
        """Wait for the save in progress; if it failed, raise its error, also in every later call."""
        if self._saving is not None:
            self._saving.result()
            self._saving = None

    def _save(self, buffer: ShardBuffer, following: Resume, dropped: int) -> None:
        """Write a shard, then its sidecar; runs in the background thread."""
        name = shard_name(self._rank, self.shards)
        check_same_folder(self._folder, self._found, self._rank, self.shards, sidecar_name(name))
        need, free = buffer.filled * self._manifest.row_bytes + _SLACK, self._folder.free_bytes()
        if free is not None and free < need:
            raise self._disk_full(need - free, "no space left")
        staged = self._folder.stage(name)
        try:
            size, digest = save_hashed(buffer.content(), staged)
            sidecar = Sidecar(
                file=name,
                rows=buffer.filled,
                nbytes=size,
                sha256=digest,
                manifest=self._found.identity,
                frame=read_frame(staged),
                dropped=dropped,
                next=following,
                documents=buffer.documents(),
            )
            self._folder.publish(staged, name)
            self._folder.write(sidecar_name(name), sidecar.dump())
        except FileNotFoundError as error:
            raise folder_lost(self._folder, self._rank, self.shards) from error
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise
            written = staged.stat().st_size if staged.exists() else 0
            raise self._disk_full(max(need - written, 1), error.strerror or str(error)) from error
        finally:
            remove(staged)
        self._count(sidecar)
        buffer.filled = 0
        self._spare.append(buffer)

    def _disk_full(self, missing: int, reason: str) -> DiskFullError:
        return DiskFullError(
            f"no space for the next shard in {self._folder.where} ({reason}): {missing:,} bytes are missing. "
            f"Its {self.shards} finished shards ({self.rows:,} rows) are valid; free some space and run again "
            "to continue",
            missing,
        )
