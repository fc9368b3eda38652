"""List the shards at given paths, and check that their sizes are right and that they belong together.

In: folders, globs, files, URLs. Out: a `Catalog`. Only small text files are read; bare tensors are memory-mapped to
get their shapes.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deeplens_lightning.options import TIMEOUT
from deeplens_lightning.shards.errors import DamagedShardError, ShardError
from deeplens_lightning.shards.folder import Folder
from deeplens_lightning.shards.format import Manifest, Rows, Sidecar, differences
from deeplens_lightning.shards.index import read_index
from deeplens_lightning.shards.local_copies import LocalCopies, local_path
from deeplens_lightning.shards.names import (
    INDEX,
    MANIFEST,
    parse_shard_name,
    shard_name,
    shard_of,
    sidecar_name,
)
from deeplens_lightning.shards.open_folder import open_folder
from deeplens_lightning.shards.paths import ShardPath, group_paths
from deeplens_lightning.shards.tensors import DTYPE_NAMES, open_bare

_OVERHEAD = 2**16  # bytes of a shard file beside its rows, at most (the zip directory)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 divided by the golden ratio

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One file of rows.

    Attributes:
        folder: the folder that the file is in.
        file: its name.
        rows: number of rows in it.
        nbytes: its size in bytes.
        sha256: its checksum; None for a bare tensor.
        storage: `exact`, `int8` or `bare`.
        document_hashes: int64 `(runs,)`, text hash of each run of consecutive rows of one document.
        document_rows: int64 `(runs,)`, rows in each run.
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
        """Path or URL of the file."""
        return f"{self.folder.where}/{self.file}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """All shards at some paths.

    Attributes:
        hook_points: `Rows` by canonical hook name, the same for every shard.
        shards: in the order in which their rows are numbered.
        manifests: by folder, for the paths that are caches and not bare tensors.
    """

    hook_points: Mapping[str, Rows]
    shards: Sequence[Shard]
    manifests: Mapping[str, Manifest]

    @property
    def rows(self) -> int:
        """Number of rows of all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def nbytes(self) -> int:
        """Size of all shards in bytes."""
        return sum(shard.nbytes for shard in self.shards)

    def digest(self) -> str:
        """A hash of the names, rows and checksums of the shards in their order: 16 hexadecimal digits."""
        found = hashlib.sha256()
        for shard in self.shards:
            found.update(f"{shard.file} {shard.rows} {shard.sha256 or shard.nbytes}\n".encode())
        return found.hexdigest()[:16]


def open_catalog(
    paths: ShardPath | Iterable[ShardPath], hook: str | None = None, copies: LocalCopies | None = None
) -> Catalog:
    """List and check the shards at some paths.

    Args:
        paths: one or several folders that `extract` wrote, `.pt` files, folders of bare `.pt` files, or globs of any
            of these; local or fsspec URLs.
        hook: hook name for bare tensors (default: from DeepLens's file names, else `activations`).
        copies: where remote bare tensors are copied to, with the time after which a server is given up; None if all
            paths are local.

    Raises:
        ShardError: there are no rows, or the shards are of different models, hook points, widths or dtypes.
        DamagedShardError: a file is missing or has another size than its sidecar says.
    """
    groups = group_paths(paths, _timeout(copies))
    parts = [_open_folder(where, files, hook, copies) for where, files in groups.items()]
    _check_alike(parts)
    catalog = Catalog(
        hook_points=parts[0].hook_points,
        shards=_divide_bare_tensors([shard for part in parts for shard in part.shards]),
        manifests={where: manifest for part in parts for where, manifest in part.manifests.items()},
    )
    if not catalog.rows:
        raise ShardError(
            f"{', '.join(groups)}: there are no rows, because the extraction has not finished a shard yet; run its "
            "extract command again to continue"
        )
    return catalog


def _timeout(copies: LocalCopies | None) -> float:
    return TIMEOUT if copies is None else copies.timeout


def _open_folder(
    where: str, files: list[str] | None, hook: str | None, copies: LocalCopies | None
) -> Catalog:
    folder = open_folder(where, _timeout(copies))
    sizes = folder.sizes()
    if MANIFEST in sizes:
        return _open_cache(folder, sizes, files)
    wanted = files if files is not None else [name for name in sizes if name.endswith(".pt")]
    if not wanted:
        raise ShardError(
            f"{where} is not a cache: it has no {MANIFEST} and no .pt file"
            + (f" (it has {', '.join(list(sizes)[:5])})" if sizes else " and may not exist")
            + "; give a folder that `extract` wrote, or .pt files"
        )
    return _open_bare_files(folder, sizes, wanted, hook, copies)


def _open_cache(folder: Folder, sizes: Mapping[str, int], files: list[str] | None) -> Catalog:
    manifest = Manifest.parse(folder.read(MANIFEST), f"{folder.where}/{MANIFEST}")
    if INDEX in sizes:
        names = [entry.file for entry in read_index(folder)]
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
                raise ShardError(
                    f"{folder.where}/{name} is not a finished shard of the cache in that folder: give the folder itself, "
                    f"or one of its shards, such as {names[0] if names else shard_name(0, 0)}"
                )
        names = [name for name in names if name in files]
    for name in names:
        if name not in sizes or sidecar_name(name) not in sizes:
            missing = name if name not in sizes else sidecar_name(name)
            raise DamagedShardError(
                f"{folder.where}/{missing} is missing: copy it again from where the cache came from, or run "
                "its extract command again, which writes the missing shards"
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
    """Check that the shards of each rank are numbered without gaps, which shows a missing one without an index.

    Raises:
        DamagedShardError: a shard is missing.
    """
    for name in names:
        rank, number = parse_shard_name(name) or (0, 0)
        before = shard_name(rank, max(0, number - 1))
        if before not in names:
            raise DamagedShardError(
                f"{folder.where}/{before} is missing and {name} is there: copy it again, or run the extract "
                "command again, which writes the missing shards"
            )


def _check_size(folder: Folder, name: str, sidecar: Sidecar, size: int, manifest: Manifest) -> None:
    where = f"{folder.where}/{name}"
    if sidecar.file != name:
        raise DamagedShardError(
            f"{folder.where}/{sidecar_name(name)} is the sidecar of {sidecar.file}, not of {name}: copy both files again "
            "from where the cache came from"
        )
    if size != sidecar.nbytes:
        raise DamagedShardError(
            f"{where} has {size:,} bytes, its sidecar says {sidecar.nbytes:,}: it is truncated or altered. "
            "Copy it again, or delete it and run the extract command again"
        )
    expected = sidecar.rows * manifest.row_bytes
    if not expected <= size <= expected + _OVERHEAD + 1024 * len(manifest.hook_points):
        raise DamagedShardError(
            f"{where} has {size:,} bytes for {sidecar.rows:,} rows; rows of the manifest's hook points take "
            f"{manifest.row_bytes} bytes each, so this shard has another d_in or dtype: copy it and {MANIFEST} again "
            "from where the cache came from"
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
            raise DamagedShardError(f"{folder.where}/{name} is missing: copy it again, or leave it out")
        with local_path(folder, name, sizes[name], None, copies) as path:
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
                        + ". Give shards of one model"
                    )


def _model(manifest: Manifest) -> Any:
    return manifest.comparable()["config"].get("model")


def _name_rows(hook_points: Mapping[str, Rows]) -> str:
    return ", ".join(f"{name} ({rows.d_in} wide, {rows.dtype})" for name, rows in hook_points.items())


def _divide_bare_tensors(shards: Sequence[Shard]) -> list[Shard]:
    """Divide bare tensors into stretches of neighbouring rows that stand in for documents in the held-out split.

    The stretches' hashes are multiples of the golden ratio modulo 1 (as 64-bit integers), which fill the unit interval
    evenly: for any `val_fraction` the number of stretches held out is right to within one. Documents are not known
    here; only those at the edges of a stretch can be in both splits.
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
        result.append(replace(shard, document_hashes=hashes, document_rows=lengths))
    return result
