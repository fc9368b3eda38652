"""What a reader is pointed at: folders, globs, files, URLs, turned into one checked list of shards.

Sizes are checked here, at once, and nothing but small text files is read (bare tensors are mapped, to
learn their shapes).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deeplens_lightning.shards.errors import DamagedShardError, ShardError
from deeplens_lightning.shards.folder import Folder, LocalFolder, open_folder
from deeplens_lightning.shards.format import (
    INDEX,
    MANIFEST,
    Manifest,
    Rows,
    Sidecar,
    differences,
    parse_shard_name,
    shard_name,
    shard_of,
    sidecar_name,
)
from deeplens_lightning.shards.paths import Source, group_sources
from deeplens_lightning.shards.remote import LocalCopies
from deeplens_lightning.shards.save import read_index
from deeplens_lightning.shards.tensors import DTYPE_NAMES, open_bare

_OVERHEAD = 2**16  # a shard's zip directory, per file
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One file of rows.

    Attributes:
        folder, file: where it is.
        rows, nbytes: its size.
        sha256: of its bytes, None for a bare tensor.
        storage: `exact`, `int8` or `bare`.
        document_hashes, document_rows: runs of consecutive rows of one document.
    """

    folder: Folder
    file: str
    rows: int
    nbytes: int
    sha256: str | None
    storage: str
    document_hashes: NDArray[np.int64]
    document_rows: NDArray[np.int64]

    @property
    def where(self) -> str:
        """Path or URL."""
        return f"{self.folder.where}/{self.file}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """Every shard of the sources, with what their rows are.

    Attributes:
        hook_points: `Rows` by canonical hook name, the same for every shard.
        shards: in order.
        manifests: of the caches among the sources, by folder.
    """

    hook_points: Mapping[str, Rows]
    shards: Sequence[Shard]
    manifests: Mapping[str, Manifest]

    @property
    def rows(self) -> int:
        """Rows in all."""
        return sum(shard.rows for shard in self.shards)

    @property
    def nbytes(self) -> int:
        """Bytes in all."""
        return sum(shard.nbytes for shard in self.shards)


def open_catalog(
    sources: Source | Iterable[Source], hook: str | None = None, copies: LocalCopies | None = None
) -> Catalog:
    """List and check the shards of some sources.

    Args:
        sources: folders that `extract` wrote, `.pt` files, folders of bare `.pt` files, globs of any of
            these; local or fsspec URLs.
        hook: hook name for bare tensors (default: from DeepLens's file names, else `activations`).
        copies: where remote bare tensors are fetched to.

    Raises:
        ShardError: nothing there, or what is there does not belong together.
        DamagedShardError: a file is missing or has another size than its sidecar says.
    """
    groups = group_sources(sources)
    parts = [_open_folder(where, files, hook, copies) for where, files in groups.items()]
    _check_alike(parts)
    catalog = Catalog(
        hook_points=parts[0].hook_points,
        shards=_weyl_documents([shard for part in parts for shard in part.shards]),
        manifests={where: manifest for part in parts for where, manifest in part.manifests.items()},
    )
    if not catalog.rows:
        raise ShardError(f"no rows in {', '.join(groups)}: its extraction has not finished a shard yet")
    return catalog


def _open_folder(
    where: str, files: list[str] | None, hook: str | None, copies: LocalCopies | None
) -> Catalog:
    folder = open_folder(where)
    sizes = folder.sizes()
    if MANIFEST in sizes:
        return _open_cache(folder, sizes, files)
    wanted = files if files is not None else [name for name in sizes if name.endswith(".pt")]
    if not wanted:
        raise ShardError(
            f"{where} is no cache: it has no {MANIFEST} and no .pt file"
            + (f" (there are {', '.join(list(sizes)[:5])})" if sizes else " and may not exist")
        )
    return _open_bare_files(folder, sizes, wanted, hook, copies)


def _open_cache(folder: Folder, sizes: Mapping[str, int], files: list[str] | None) -> Catalog:
    manifest = Manifest.parse(folder.read(MANIFEST), f"{folder.where}/{MANIFEST}")
    if INDEX in sizes:
        names = [shard["file"] for shard in read_index(folder)]
    else:
        names = [shard for name in sizes if (shard := shard_of(name)) is not None]
        log.warning(
            "%s is not finished: reading its %d finished shards; run its extract command again to continue",
            folder.where,
            len(names),
        )
        _check_gapless(folder, names)
    if files is not None:
        for name in files:
            if name not in names:
                raise ShardError(f"{folder.where}/{name} is no finished shard of the cache in its folder")
        names = [name for name in names if name in files]
    for name in names:
        if name not in sizes or sidecar_name(name) not in sizes:
            missing = name if name not in sizes else sidecar_name(name)
            raise DamagedShardError(
                f"{folder.where}/{missing} is missing: copy it again from where the cache came from, or run "
                "its extract command again, which writes what is missing"
            )
    shards = []
    for name, text in zip(names, folder.read_many([sidecar_name(name) for name in names]), strict=True):
        sidecar = Sidecar.parse(text, f"{folder.where}/{sidecar_name(name)}")
        _check_size(folder, name, sidecar, sizes[name], manifest)
        shards.append(
            Shard(
                folder=folder,
                file=name,
                rows=sidecar.rows,
                nbytes=sidecar.nbytes,
                sha256=sidecar.sha256,
                storage=manifest.storage,
                document_hashes=sidecar.document_hashes,
                document_rows=sidecar.document_rows.astype(np.int64),
            )
        )
    return Catalog(hook_points=manifest.hook_points, shards=shards, manifests={folder.where: manifest})


def _check_gapless(folder: Folder, names: Sequence[str]) -> None:
    """Shards of a rank are numbered without gaps, so a missing one shows even before there is an index."""
    for name in names:
        rank, number = parse_shard_name(name) or (0, 0)
        before = shard_name(rank, max(0, number - 1))
        if before not in names:
            raise DamagedShardError(
                f"{folder.where}/{before} is missing and {name} is there: copy it again, or run the extract "
                "command again, which writes what is missing"
            )


def _check_size(folder: Folder, name: str, sidecar: Sidecar, size: int, manifest: Manifest) -> None:
    where = f"{folder.where}/{name}"
    if sidecar.file != name:
        raise DamagedShardError(
            f"{folder.where}/{sidecar_name(name)} belongs to {sidecar.file}, not to {name}"
        )
    if size != sidecar.nbytes:
        raise DamagedShardError(
            f"{where} has {size:,} bytes, its sidecar says {sidecar.nbytes:,}: it is truncated or altered. "
            "Copy it again, or delete it and run the extract command again"
        )
    expected = sidecar.rows * manifest.row_bytes
    if not expected <= size <= expected + _OVERHEAD + 1024 * len(manifest.hook_points):
        raise DamagedShardError(
            f"{where} has {size:,} bytes for {sidecar.rows:,} rows, which cannot be rows as the manifest "
            f"describes them ({manifest.row_bytes} bytes each): it is of another d_in or dtype"
        )


def _open_bare_files(
    folder: Folder,
    sizes: Mapping[str, int],
    names: Sequence[str],
    hook: str | None,
    copies: LocalCopies | None,
) -> Catalog:
    hook_points: dict[str, Rows] = {}
    shards: list[Shard] = []
    for name in names:
        if name not in sizes:
            raise DamagedShardError(f"{folder.where}/{name} is missing")
        path = local_path(folder, name, sizes[name], None, copies)
        [(found, rows)] = open_bare(path, hook).rows.items()
        here = {found: Rows(d_in=rows.shape[1], dtype=DTYPE_NAMES[rows.dtype])}
        if hook_points and here != hook_points:
            raise ShardError(
                f"{folder.where}/{name} holds {_name_rows(here)}, {names[0]} holds {_name_rows(hook_points)}"
                ": give files of one hook point, d_in and dtype"
            )
        hook_points = here
        shards.append(
            Shard(
                folder=folder,
                file=name,
                rows=len(rows),
                nbytes=sizes[name],
                sha256=None,
                storage="bare",
                document_hashes=np.zeros(0, np.int64),
                document_rows=np.zeros(0, np.int64),
            )
        )
    return Catalog(hook_points=hook_points, shards=shards, manifests={})


def local_path(folder: Folder, file: str, size: int, sha256: str | None, copies: LocalCopies | None) -> Path:
    """A local path that holds a file now."""
    if isinstance(folder, LocalFolder):
        return folder.path / file
    if copies is None:
        raise ShardError(f"{folder.where} is remote: give room for local copies")
    return copies.get(folder, file, size, sha256)


def _check_alike(parts: Sequence[Catalog]) -> None:
    first = parts[0]
    for part in parts[1:]:
        where, at = (next(iter(catalog.shards)).where if catalog.shards else "?" for catalog in (part, first))
        if part.hook_points != first.hook_points:
            raise ShardError(
                f"{where} holds {_name_rows(part.hook_points)}, {at} holds {_name_rows(first.hook_points)}: "
                "give shards of the same hook points, d_in and dtype"
            )
        for one in part.manifests.values():
            for other in first.manifests.values():
                different = differences(_model(other), _model(one))
                if different:
                    raise ShardError(
                        f"{where} and {at} come from different models: "
                        + "; ".join(
                            f"{name or 'model'} is {here!r} and {there!r}" for name, there, here in different
                        )
                    )


def _model(manifest: Manifest) -> Any:
    return manifest.comparable()["config"].get("model")


def _name_rows(hook_points: Mapping[str, Rows]) -> str:
    return ", ".join(f"{name} ({rows.d_in} wide, {rows.dtype})" for name, rows in hook_points.items())


def _weyl_documents(shards: Sequence[Shard]) -> list[Shard]:
    """Give bare tensors documents to split by: stretches of neighbouring rows with evenly spread hashes.

    Multiples of the golden ratio modulo 1 fill the unit interval evenly, so any fraction of these
    stretches is held out to within one, and only their edges can share a document.
    """
    bare = sum(shard.rows for shard in shards if shard.storage == "bare")
    stretch = min(max(bare // 256, 1), 1024)
    result, seen = [], 0
    for shard in shards:
        if shard.storage != "bare":
            result.append(shard)
            continue
        count = -(-shard.rows // stretch)
        lengths = np.full(count, stretch, np.int64)
        lengths[-1] = shard.rows - stretch * (count - 1)
        hashes = (np.arange(seen + 1, seen + 1 + count).astype(np.uint64) * _GOLDEN).view(np.int64)
        seen += count
        result.append(
            Shard(
                folder=shard.folder,
                file=shard.file,
                rows=shard.rows,
                nbytes=shard.nbytes,
                sha256=None,
                storage="bare",
                document_hashes=hashes,
                document_rows=lengths,
            )
        )
    return result
