"""Open the shards of a catalog, and compare their content with what is known of it.

In: a `Shard` and a local path. Out: an `OpenShard`. Opening always compares the bytes outside the numbers and the
documents at the starts of runs; `check_sum` compares every byte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deeplens_lightning.shards.catalog import Shard
from deeplens_lightning.shards.checksum import sha256_of
from deeplens_lightning.shards.errors import DamagedShardError
from deeplens_lightning.shards.format import Rows
from deeplens_lightning.shards.frame import check_crcs, check_frame, check_frame_crcs
from deeplens_lightning.shards.sidecar import FIX
from deeplens_lightning.shards.tensors import OpenShard, open_bare, open_shard


def open_listed(
    shard: Shard, path: Path, hook_points: Mapping[str, Rows], bare_hook: str | None
) -> OpenShard:
    """Memory-map a shard of a catalog, and compare the little of it that tells it from other shards.

    Args:
        shard: the shard.
        path: path of the file, or of its local copy.
        hook_points: `Rows` by canonical hook name of the catalog.
        bare_hook: hook name for bare tensors.

    Raises:
        DamagedShardError: it is missing, or is not the shard that its sidecar describes.
    """
    try:
        if shard.storage == "bare":
            check_frame_crcs(path, shard.where)
        elif shard.frame is not None:
            check_frame(path, shard.frame, shard.where, FIX)
    except OSError as error:
        raise _unreadable(shard, error) from error
    if shard.storage == "bare":
        [kind] = hook_points.values()
        return open_bare(path, bare_hook, (shard.rows, kind.d_in))
    opened = open_shard(path, hook_points, shard.storage, shard.rows)
    starts = np.cumsum(shard.document_rows) - shard.document_rows
    if not np.array_equal(opened.provenance[:, 0].numpy()[starts], shard.document_hashes):
        raise DamagedShardError(
            f"{shard.where} is altered, or is another shard: it holds other documents than its sidecar says. {FIX}"
        )
    return opened


def check_sum(shard: Shard, path: Path) -> None:
    """Compare every byte of a shard with its checksum; of a bare tensor, with the CRCs in its file.

    Rows of a bare tensor must also be finite.

    Args:
        shard: the shard with the checksum.
        path: path of the local file to compare.

    Raises:
        DamagedShardError: it is missing or altered, or a row of a bare tensor holds NaN or infinity.
    """
    try:
        if shard.sha256 is None:
            check_crcs(path, shard.where)
            [rows] = open_bare(path, None).rows.values()
            check_finite(shard.where, rows)
        elif (found := sha256_of(path)) != shard.sha256:
            raise DamagedShardError(
                f"{shard.where} is altered: its checksum is {found}, its sidecar says {shard.sha256}. Copy it "
                "again, or delete it and run the command that wrote it again"
            )
    except OSError as error:
        raise _unreadable(shard, error) from error


def check_finite(where: str, rows: Tensor, piece: int = 2**14) -> None:
    """Check that all rows of a shard are finite.

    Args:
        where: path or URL of the shard, for messages.
        rows: `(n, d_in)`.
        piece: number of rows to look at at once.

    Raises:
        DamagedShardError: rows hold NaN or infinity.
    """
    parts = (rows[start : start + piece] for start in range(0, len(rows), piece))
    bad = sum(int((~torch.isfinite(part).all(dim=1)).sum().item()) for part in parts)
    if bad:
        raise DamagedShardError(
            f"{where} holds NaN or infinity in {bad} of {len(rows)} rows: extract it again"
        )


def check_finite_bare(
    rows: Mapping[str, Tensor], numbers: NDArray[np.int64], places: NDArray[np.int64], shards: Sequence[Shard]
) -> None:
    """Check that gathered rows of bare tensors are finite: nothing else shows that such a file is damaged.

    Args:
        rows: `(n, d_in)` by hook name.
        numbers: number of the shard of each row, int64 `(n,)`.
        places: number of each row within its shard, int64 `(n,)`.
        shards: the shards.

    Raises:
        DamagedShardError: a row of a bare tensor holds NaN or infinity.
    """
    for batch in rows.values():
        if bool(batch.sum(dtype=torch.float32).isfinite()):
            continue  # one pass; if the sum overflows, the rows are looked at one by one
        for row in (~torch.isfinite(batch).all(dim=1)).nonzero().flatten().tolist():
            shard = shards[numbers[row]]
            if shard.storage == "bare":
                raise DamagedShardError(
                    f"{shard.where} holds NaN or infinity in row {places[row]}: extract it again, or leave the file out"
                )


def _unreadable(shard: Shard, error: OSError) -> DamagedShardError:
    if isinstance(error, FileNotFoundError):
        return DamagedShardError(
            f"{shard.where} is missing: copy it again, or run the command that wrote it again"
        )
    return DamagedShardError(f"{shard.where} cannot be read: {error.strerror or error}. {FIX}")
