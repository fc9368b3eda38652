"""Notice that a shard was truncated or overwritten while it is mapped into memory.

A mapped file is read without further checks: rows that are written over it are served, and a read behind a new, earlier
end kills the process with SIGBUS. Therefore the size and the time of the last change of every open shard are compared
with those at its opening, whenever other shards are opened and every `EVERY` batches. What cannot be noticed: a change
between two checks (a truncation there still ends in SIGBUS, without a message), and one that restores the time, or
comes within the clock's resolution (some milliseconds) of the opening. On network mounts a change made by another
machine is seen when the mount's own cache of attributes is renewed. A file that was deleted, or replaced by another one
of the same size and time, does no harm: the old content stays mapped.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from os import stat_result
from pathlib import Path

from deeplens_lightning.shards.errors import DamagedShardError

EVERY = 16
"""Number of batches between two checks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opened:
    path: Path
    where: str
    replaceable: bool
    stat: stat_result


@dataclass(slots=True)
class OpenFiles:
    """Size and time of the files of open shards, by number of the shard."""

    _files: dict[int, _Opened] = field(default_factory=dict)
    _batches: int = 0

    def note(self, number: int, path: Path, where: str, replaceable: bool) -> None:
        """Note a file before its content is checked and mapped.

        Args:
            number: number of the shard.
            path: path of the file.
            where: path or URL of the shard, for messages.
            replaceable: the file may be replaced by an equal one: it is a copy, which another process may fetch again.
        """
        try:
            stat = path.stat()
        except FileNotFoundError as error:
            raise DamagedShardError(f"{where} is missing") from error
        self._files[number] = _Opened(path=path, where=where, replaceable=replaceable, stat=stat)

    def keep(self, numbers: Collection[int]) -> None:
        """Forget all files but those of some shards."""
        self._files = {number: file for number, file in self._files.items() if number in numbers}

    def check_sometimes(self) -> None:
        """Count a batch, and check the files if it is the `EVERY`-th.

        Raises:
            DamagedShardError: as `check`.
        """
        self._batches += 1
        if self._batches % EVERY == 0:
            self.check()

    def check(self) -> None:
        """Compare every file with its size and time when it was noted.

        Raises:
            DamagedShardError: a file was truncated, extended or overwritten.
        """
        for file in self._files.values():
            try:
                now = file.path.stat()
            except FileNotFoundError:
                continue
            if file.replaceable and now.st_ino != file.stat.st_ino:
                continue
            if (now.st_size, now.st_mtime_ns) != (file.stat.st_size, file.stat.st_mtime_ns):
                raise DamagedShardError(
                    f"{file.where} was changed while it was in use: {file.path} had {file.stat.st_size:,} bytes and has "
                    f"{now.st_size:,} now, and was written to since it was opened. Rows served since then may be wrong: "
                    "run `deeplens-lightning verify`, and continue from a checkpoint before the change"
                )
