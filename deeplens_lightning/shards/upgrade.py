"""Rewrite the JSON files of a cache of format version 1 in the present version; shards stay as they are.

The manifest is written last. Until then the cache is one of version 1, whose other files may have either version, so that
an upgrade that was killed can be read and run again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from deeplens_lightning.shards.errors import ShardError
from deeplens_lightning.shards.folder import Folder
from deeplens_lightning.shards.format import VERSION, Manifest
from deeplens_lightning.shards.frame import Frame
from deeplens_lightning.shards.index import Index, read_mark
from deeplens_lightning.shards.names import INDEX, MANIFEST, done_name, shard_of, sidecar_name
from deeplens_lightning.shards.sidecar import Written, read_sidecars


def upgrade_cache(folder: Folder, manifest: Manifest, frames: Mapping[str, Frame]) -> None:
    """Rewrite the JSON files of a cache.

    Args:
        folder: folder of the cache.
        manifest: its manifest.
        frames: frame of every shard of the cache by file name, in order; their content was checked.

    Raises:
        ShardError: `frames` are of only some of the shards, or another process is writing to the folder.
    """
    with _locked(folder, manifest):
        sizes = folder.sizes()
        if {shard for name in sizes if (shard := shard_of(name)) is not None} != set(frames):
            raise ShardError(
                f"{folder.where} can be upgraded only as a whole: give the folder, not single shards"
            )
        old = [each.sidecar for each in read_sidecars(folder, sizes, list(frames), manifest)]
        new = replace(
            manifest, version=VERSION, shard_rows=max((sidecar.rows for sidecar in old), default=None)
        )
        written = []
        for sidecar in old:
            changed = replace(sidecar, manifest=new.identity, frame=frames[sidecar.file])
            written.append(Written(sidecar=changed, data=changed.dump()))
        for each in written:
            folder.write(sidecar_name(each.sidecar.file), each.data)
        for rank in range(manifest.world_size):
            if done_name(rank) in sizes:
                mark = replace(read_mark(folder, sizes, rank, manifest), manifest=new.identity)
                folder.write(done_name(rank), mark.dump())
        if INDEX in sizes:
            folder.write(INDEX, Index.of(new, written).dump())
        folder.write(MANIFEST, new.dump())


@contextmanager
def _locked(folder: Folder, manifest: Manifest) -> Iterator[None]:
    """Keep the writers of all ranks out."""
    with ExitStack() as stack:
        for rank in range(manifest.world_size):
            stack.callback(folder.lock(f".lock-rank{rank:05d}").release)
        yield
