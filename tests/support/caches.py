"""Write caches of random rows with provenance, the same in every run, for the tests of shards; read them back."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deeplens_lightning.disk.json_text import signed
from deeplens_lightning.disk.records import to_plain
from deeplens_lightning.shards import Manifest, Rows, ShardStream, ShardWriter
from deeplens_lightning.shards.checksum import sha256_of
from deeplens_lightning.shards.frame import read_frame
from deeplens_lightning.shards.names import MANIFEST
from deeplens_lightning.types import Served

WIDE, NARROW = "layers.0.mlp_out", "layers.1.resid_post"


def manifest(world_size: int = 1, storage: str = "exact", **config: object) -> Manifest:
    return Manifest(
        hook_points={WIDE: Rows(d_in=16, dtype="float32"), NARROW: Rows(d_in=8, dtype="bfloat16")},
        storage=storage,
        config={"model": {"name": "random"}, "packing": {"seq_length": 37}, **config},
        world_size=world_size,
    )


def make_rows(n: int, seed: int = 0, document: int = 37) -> tuple[dict[str, Tensor], Tensor]:
    """`n` rows of two hook points in documents of `document` rows each; row i does not depend on `n`."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.arange(n) // document
    hashes = torch.randint(-(2**63), 2**63 - 1, (10_000,), generator=generator)
    tokens = torch.randint(0, 50_000, (200_000,), generator=generator)
    wide = torch.randn(200_000, 16, generator=generator)[:n]
    rows = {WIDE: wide, NARROW: (wide[:, :8] * 2).bfloat16()}
    return rows, torch.stack([hashes[index], index, torch.arange(n) % document, tokens[:n]], dim=1)


def feed(
    writer: ShardWriter,
    rows: dict[str, Tensor],
    provenance: Tensor,
    batch: int = 100,
    stop: int | None = None,
) -> None:
    """Append batches of `batch` rows, from where the writer continues to row `stop`."""
    start = writer.resume.source["row"] if writer.resume.source is not None else 0
    for first in range(start, len(provenance) if stop is None else stop, batch):
        part = slice(first, first + batch)
        writer.append(
            {name: value[part] for name, value in rows.items()},
            provenance[part],
            source={"row": first},
            first_row=first,
        )


def write_cache(where: str | Path, n: int = 3000, shard_rows: int = 700, **kwargs: object) -> None:
    """A finished cache of `make_rows(n)`."""
    rows, provenance = make_rows(n)
    description = manifest(**kwargs)
    with ShardWriter(where, description, shard_bytes=shard_rows * description.row_bytes) as writer:
        feed(writer, rows, provenance)
        writer.finish()


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the content of a JSON file of a cache, and give it the digest of its new content."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(signed(content) if content["version"] > 1 else content, indent=2))


def forge_sidecar(shard: Path) -> None:
    """Make the sidecar of a shard agree with what the shard holds now, but for its documents."""
    changed = {
        "nbytes": shard.stat().st_size,
        "sha256": sha256_of(shard),
        "frame": to_plain(read_frame(shard)),
    }
    edit(shard.with_suffix(".json"), lambda content: content.update(changed))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a cache."""
    return Manifest.parse((folder / MANIFEST).read_bytes(), str(folder))


def one_epoch(stream: ShardStream, epoch: int = 0) -> Iterator[Served]:
    """All batches of an epoch."""
    return stream.batches(stream.start(epoch), 0)


def read_back(where: str | Path) -> tuple[dict[str, Tensor], Tensor]:
    """All rows of a cache in order, read with plain `torch.load`."""
    files = [torch.load(path, mmap=True, weights_only=True) for path in sorted(Path(where).glob("*.pt"))]
    names = files[0]["rows"]
    return (
        {name: torch.cat([file["rows"][name] for file in files]) for name in names},
        torch.cat([file["provenance"] for file in files]),
    )


def on_disk(folder: Path) -> int:
    """Bytes of all files in a folder, which another thread or process may delete meanwhile."""
    found = 0
    for path in folder.rglob("*"):
        try:
            found += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # deleted since it was listed
            continue
    return found


def write_here(folder: str, rows: int, file_limit: int | None = None, stop: int | None = None) -> None:
    """Start or continue a cache of `make_rows(rows)`.

    Args:
        folder: where it is.
        rows: all rows of the finished cache.
        file_limit: the size in bytes of the largest file that may be written.
        stop: the row at which the process blocks until it is killed.
    """
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
    with ShardWriter(folder, manifest(), shard_bytes=500 * manifest().row_bytes) as writer:
        feed(writer, *make_rows(rows), batch=50, stop=stop)
        if stop is not None:
            time.sleep(3600)
        writer.finish()


def read_windows(folder: str, window_bytes: int | None) -> None:
    """Read a cache; print by how many bytes peak memory grew, and memory without mapped files."""
    shuffle = "window" if window_bytes else "global"
    stream = ShardStream(folder, batch_size=1024, shuffle=shuffle, window_bytes=window_bytes)
    batches = one_epoch(stream)
    next(batches)
    before, own = _peak(), _own()
    for _ in batches:
        own = min(own, _own())
    print(_peak() - before, max(_own() - own, 0))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _own() -> int:
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("RssAnon")).split()[1]) * 1024
