"""Buffer of one shard being filled: preallocated tensors of rows and provenance, in the dtypes of the file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deeplens_lightning.shards.codec import quantize
from deeplens_lightning.shards.errors import ShardError
from deeplens_lightning.shards.format import DTYPES, Manifest
from deeplens_lightning.shards.sidecar import Documents


class ShardBuffer:
    """Preallocated rows of every hook point and their provenance, filled from the front.

    Args:
        manifest: hook points and storage.
        capacity: number of rows that fit.

    Attributes:
        capacity: number of rows that fit.
        filled: number of rows filled; set it to 0 to use the buffer again.
    """

    def __init__(self, manifest: Manifest, capacity: int) -> None:
        self.capacity = capacity
        self.filled = 0
        self._int8 = manifest.storage == "int8"
        self._rows = {
            name: torch.empty(capacity, rows.d_in, dtype=torch.int8 if self._int8 else DTYPES[rows.dtype])
            for name, rows in manifest.hook_points.items()
        }
        self._scales = {name: torch.empty(capacity) for name in self._rows if self._int8}
        self._provenance = torch.empty(capacity, 4, dtype=torch.int64)

    @property
    def room(self) -> int:
        """Number of rows that still fit."""
        return self.capacity - self.filled

    def fill(self, rows: Mapping[str, Tensor], provenance: Tensor, index: Tensor) -> None:
        """Append some rows.

        Args:
            rows: `(n, d_in)` by hook name, on any device.
            provenance: int64 `(n, 4)`, on any device.
            index: which of the `n` rows to append, int64 `(m,)`, ascending, `1 <= m <= room`.
        """
        first, last = int(index[0]), int(index[-1])
        contiguous = last - first + 1 == len(index)
        span = slice(self.filled, self.filled + len(index))
        for name, buffer in self._rows.items():
            given = rows[name]
            part = given[first : last + 1] if contiguous else given[index.to(given.device)]
            if self._int8:
                codes, scales = quantize(part)
                buffer[span], self._scales[name][span] = codes.cpu(), scales.cpu()
            else:
                buffer[span] = part.cpu()
        self._provenance[span] = provenance[index.to(provenance.device)].cpu()
        self.filled = span.stop

    def content(self) -> dict[str, Any]:
        """The content of the shard file: rows, scales if rows are int8, and provenance, by name."""
        content: dict[str, Any] = {"rows": {name: self._used(rows) for name, rows in self._rows.items()}}
        if self._int8:
            content["scales"] = {name: self._used(scales) for name, scales in self._scales.items()}
        return {**content, "provenance": self._used(self._provenance)}

    def documents(self) -> Documents:
        """The runs of consecutive rows of one document."""
        return Documents.of(self._provenance[: self.filled].numpy())

    def _used(self, tensor: Tensor) -> Tensor:
        """The filled rows; a copy unless all are filled, because `torch.save` saves the whole storage of a view."""
        return tensor if self.filled == self.capacity else tensor[: self.filled].clone()


def check_rows(manifest: Manifest, rows: Mapping[str, Tensor], count: int) -> None:
    """Check that rows are those that a manifest describes.

    Args:
        manifest: the hook points, widths and dtypes.
        rows: `(count, d_in)` by hook name.
        count: number of rows.

    Raises:
        ShardError: hook points, shapes or dtypes differ.
    """
    if set(rows) != set(manifest.hook_points):
        raise ShardError(f"got rows of {sorted(rows)}, the manifest says {sorted(manifest.hook_points)}")
    for name, want in manifest.hook_points.items():
        got, shape = rows[name], (count, want.d_in)
        if got.dtype != DTYPES[want.dtype] or tuple(got.shape) != shape:
            raise ShardError(
                f"rows of {name} are {got.dtype} {tuple(got.shape)}, the manifest says {want.dtype} {shape}"
            )
