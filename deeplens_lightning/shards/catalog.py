"""List the shards at given paths, and check that their sizes are right and that they belong together.

In: folders, globs, files, URLs. Out: a `Catalog`. Only small text files are read; bare tensors are memory-mapped to
get their shapes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from deeplens_lightning.options import TIMEOUT
from deeplens_lightning.shards.errors import DamagedShardError, ShardError
from deeplens_lightning.shards.folder import Folder
from deeplens_lightning.shards.format import Manifest, Rows, differences
from deeplens_lightning.shards.frame import Frame
from deeplens_lightning.shards.listing import Refuse, list_cache
from deeplens_lightning.shards.local_copies import LocalCopies, local_path
from deeplens_lightning.shards.names import MANIFEST
from deeplens_lightning.shards.open_folder import open_folder
from deeplens_lightning.shards.paths import ShardPath, group_paths
from deeplens_lightning.shards.tensors import DTYPE_NAMES, open_bare

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 divided by the golden ratio


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One file of rows.

    Attributes:
        folder: the folder that the file is in.
        file: its name.
        rows: number of rows in it.
        nbytes: its size in bytes.
        sha256: its checksum; None for a bare tensor in a file.
        frame: checksum of its bytes outside its numbers; None for a bare tensor and in format version 1.
        storage: `exact`, `int8` or `bare`.
        document_hashes: int64 `(runs,)`, text hash of each run of consecutive rows of one document.
        document_rows: int64 `(runs,)`, rows in each run.
        tensor: rows `(n, d_in)` that are in memory; None if they are in the file.
    """

    folder: Folder
    file: str
    rows: int
    nbytes: int
    sha256: str | None
    frame: Frame | None
    storage: str
    document_hashes: NDArray[np.int64]
    document_rows: NDArray[np.int64]
    tensor: Tensor | None = None

    @property
    def where(self) -> str:
        """Path or URL of the file."""
        return f"{self.folder.where}/{self.file}" if self.tensor is None else self.file


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """All shards at some paths.

    Attributes:
        hook_points: `Rows` by canonical hook name, the same for every shard.
        shards: in the order in which their rows are numbered.
        manifests: by folder, for the paths that are caches and not bare tensors.
        finished: whether nothing is left to write to any of the caches.
    """

    hook_points: Mapping[str, Rows]
    shards: Sequence[Shard]
    manifests: Mapping[str, Manifest]
    finished: bool = True

    @property
    def rows(self) -> int:
        """Number of rows of all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def nbytes(self) -> int:
        """Size of all shards in bytes."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def stretch_rows(self) -> int:
        """Number of rows of a full shard, the largest of several caches; it does not depend on when shards were saved.

        For bare tensors and caches of format version 1, which do not record it, the rows of the largest shard.
        """
        recorded = [self._recorded_rows(where) for where in self.manifests]
        others = [shard.rows for shard in self.shards if not self._recorded_rows(shard.folder.where)]
        return max([*recorded, *others])

    def _recorded_rows(self, where: str) -> int:
        manifest = self.manifests.get(where)
        return manifest.shard_rows or 0 if manifest is not None else 0

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
    return list_shards(paths, hook, copies, _raise)


def list_shards(
    paths: ShardPath | Iterable[ShardPath], hook: str | None, copies: LocalCopies | None, refuse: Refuse
) -> Catalog:
    """`open_catalog`, which calls `refuse` with everything that is wrong with single shards.

    Raises:
        ShardError: which shards there are cannot be known, or none is left.
    """
    groups = group_paths(paths, _timeout(copies))
    parts = [_open_folder(where, files, hook, copies, refuse) for where, files in groups.items()]
    _check_alike(parts, refuse)
    catalog = Catalog(
        hook_points=parts[0].hook_points,
        shards=divide_bare_tensors([shard for part in parts for shard in part.shards]),
        manifests={where: manifest for part in parts for where, manifest in part.manifests.items()},
        finished=all(part.finished for part in parts),
    )
    if not catalog.rows:
        raise ShardError(
            f"{', '.join(groups)}: there are no rows, because no shard is finished yet; run the command that wrote "
            "it again (extract, or fit with write_shards) to continue"
        )
    return catalog


def _raise(error: ShardError) -> None:
    raise error


def _timeout(copies: LocalCopies | None) -> float:
    return TIMEOUT if copies is None else copies.timeout


def _open_folder(
    where: str, files: list[str] | None, hook: str | None, copies: LocalCopies | None, refuse: Refuse
) -> Catalog:
    folder = open_folder(where, timeout=_timeout(copies))
    sizes = folder.sizes()
    if MANIFEST in sizes:
        return _open_cache(folder, sizes, files, refuse)
    wanted = files if files is not None else [name for name in sizes if name.endswith(".pt")]
    if not wanted:
        raise ShardError(
            f"{where} is not a cache: it has no {MANIFEST} and no .pt file"
            + (f" (it has {', '.join(list(sizes)[:5])})" if sizes else " and may not exist")
            + "; give a folder that `extract` wrote, or .pt files"
        )
    return _open_bare_files(folder, sizes, wanted, hook, copies, refuse)


def _open_cache(folder: Folder, sizes: Mapping[str, int], files: list[str] | None, refuse: Refuse) -> Catalog:
    listing = list_cache(folder, sizes, files, refuse)
    shards = []
    for sidecar in listing.sidecars:
        hashes, lengths = sidecar.documents.arrays()
        shards.append(
            Shard(
                folder=folder,
                file=sidecar.file,
                rows=sidecar.rows,
                nbytes=sidecar.nbytes,
                sha256=sidecar.sha256,
                frame=sidecar.frame,
                storage=listing.manifest.storage,
                document_hashes=hashes,
                document_rows=lengths,
            )
        )
    return Catalog(
        hook_points=listing.manifest.hook_points,
        shards=shards,
        manifests={folder.where: listing.manifest},
        finished=listing.finished,
    )


def _open_bare_files(
    folder: Folder,
    sizes: Mapping[str, int],
    names: Sequence[str],
    hook: str | None,
    copies: LocalCopies | None,
    refuse: Refuse,
) -> Catalog:
    hook_points: dict[str, Rows] = {}
    shards: list[Shard] = []
    for name in names:
        try:
            here, rows = _bare_rows(folder, sizes, name, hook, copies)
            if hook_points and here != hook_points:
                raise ShardError(
                    f"{folder.where}/{name} holds {_name_rows(here)}, {shards[0].file} holds {_name_rows(hook_points)}"
                    ": give files of one hook point, d_in and dtype"
                )
        except ShardError as error:
            refuse(error)
            continue
        hook_points = here
        shards.append(
            Shard(
                folder=folder,
                file=name,
                rows=rows,
                nbytes=sizes[name],
                sha256=None,
                frame=None,
                storage="bare",
                document_hashes=np.zeros(0, np.int64),
                document_rows=np.zeros(0, np.int64),
            )
        )
    return Catalog(hook_points=hook_points, shards=shards, manifests={})


def _bare_rows(
    folder: Folder, sizes: Mapping[str, int], name: str, hook: str | None, copies: LocalCopies | None
) -> tuple[dict[str, Rows], int]:
    """What a file with a bare tensor holds, and the number of its rows."""
    if name not in sizes:
        raise DamagedShardError(f"{folder.where}/{name} is missing: copy it again, or leave it out")
    with local_path(folder, name, sizes[name], None, copies) as path:
        [(found, rows)] = open_bare(path, hook).rows.items()
    return {found: Rows(d_in=rows.shape[1], dtype=DTYPE_NAMES[rows.dtype])}, len(rows)


def _check_alike(parts: Sequence[Catalog], refuse: Refuse) -> None:
    first = parts[0]
    for part in parts[1:]:
        where, at = (next(iter(catalog.shards)).where if catalog.shards else "?" for catalog in (part, first))
        if part.hook_points != first.hook_points:
            refuse(
                ShardError(
                    f"{where} holds {_name_rows(part.hook_points)}, {at} holds {_name_rows(first.hook_points)}: "
                    "give shards of the same hook points, d_in and dtype"
                )
            )
        for one in part.manifests.values():
            for other in first.manifests.values():
                different = differences(_model(other), _model(one))
                if different:
                    refuse(
                        ShardError(
                            f"{where} and {at} come from different models: "
                            + "; ".join(
                                f"{name or 'model'} is {here!r} and {there!r}"
                                for name, there, here in different
                            )
                            + ". Give shards of one model"
                        )
                    )


def _model(manifest: Manifest) -> Any:
    return manifest.comparable()["config"].get("model")


def _name_rows(hook_points: Mapping[str, Rows]) -> str:
    return ", ".join(f"{name} ({rows.d_in} wide, {rows.dtype})" for name, rows in hook_points.items())


def divide_bare_tensors(shards: Sequence[Shard]) -> list[Shard]:
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
