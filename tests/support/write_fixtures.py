"""Write small files in the formats of the present release: `python -m tests.support.write_fixtures FOLDER`.

Later releases read the files of `tests/fixtures/v1`, which the release with format version 1 wrote by this script.
"""

from __future__ import annotations

import sys
from pathlib import Path

from deeplens_lightning.shards import ShardWriter
from tests.support.caches import feed, make_rows, manifest, write_cache

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


def main() -> None:
    """Write everything into the folder that the command line names."""
    folder = Path(sys.argv[1])
    write_caches(folder / "caches")


if __name__ == "__main__":
    main()
