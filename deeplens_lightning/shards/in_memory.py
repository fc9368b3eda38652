"""Serve a tensor that is in memory like a bare tensor on disk: its catalog, and its rows as an open shard."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deeplens_lightning.shards.catalog import Catalog, Shard, divide_bare_tensors
from deeplens_lightning.shards.errors import ShardError
from deeplens_lightning.shards.folder import LocalFolder
from deeplens_lightning.shards.format import UNNAMED, Rows
from deeplens_lightning.shards.tensors import DTYPE_NAMES, OpenShard, unknown_provenance

_PIECE = 2**14  # rows to hash at once


def catalog_of(rows: Tensor, hook: str | None) -> Catalog:
    """A catalog of one shard that holds a tensor. The tensor is not copied; its checksum is that of its values.

    Args:
        rows: `(n, d_in)` on the CPU.
        hook: canonical name of the hook point of the rows; None if it is not known.

    Raises:
        ShardError: the tensor has another shape, dtype or device.
    """
    if rows.ndim != 2 or not rows.numel():
        raise ShardError(
            f"shards= is a tensor of shape {tuple(rows.shape)}, expected (rows, d_in) with at least one row: give "
            "x.reshape(-1, x.shape[-1])"
        )
    if rows.dtype not in DTYPE_NAMES:
        raise ShardError(
            f"shards= is a tensor of {rows.dtype}, expected {', '.join(DTYPE_NAMES.values())}: give x.float()"
        )
    if rows.device.type != "cpu" or rows.layout is not torch.strided:
        raise ShardError(
            f"shards= is a tensor on {rows.device} with the layout {rows.layout}, expected a dense one on the CPU: give "
            "x.cpu(), of a sparse tensor x.to_dense()"
        )
    rows = rows.detach()
    digest = hashlib.sha256()
    for piece in rows.split(_PIECE):
        digest.update(piece.contiguous().view(torch.uint8).numpy().data)
    shard = Shard(
        folder=LocalFolder(Path()),
        file=f"the tensor {tuple(rows.shape)} of shards=",
        rows=len(rows),
        nbytes=rows.numel() * rows.element_size(),
        sha256=digest.hexdigest(),
        frame=None,
        storage="bare",
        document_hashes=np.zeros(0, np.int64),
        document_rows=np.zeros(0, np.int64),
        tensor=rows,
    )
    kind = Rows(d_in=rows.shape[1], dtype=DTYPE_NAMES[rows.dtype])
    return Catalog(hook_points={hook or UNNAMED: kind}, shards=divide_bare_tensors([shard]), manifests={})


def open_in_memory(rows: Tensor, hook: str) -> OpenShard:
    """The rows of a tensor in memory, under the name of their hook point."""
    return OpenShard(rows={hook: rows}, scales={}, provenance=unknown_provenance(len(rows)))
