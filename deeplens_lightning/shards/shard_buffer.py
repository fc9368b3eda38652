"""A shard being filled: tensors allocated once, and what is saved of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deeplens_lightning.shards.codec import quantize
from deeplens_lightning.shards.format import DTYPES, Manifest


class ShardBuffer:
    """Room for `capacity` rows of every hook point and their provenance, in the dtypes of the disk."""

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
        """How many rows more fit."""
        return self.capacity - self.filled

    def fill(self, rows: Mapping[str, Tensor], provenance: Tensor, index: Tensor) -> None:
        """Append the rows at `index` (int64 `(m,)`, ascending, `m` at most `room`)."""
        first, last = int(index[0]), int(index[-1])
        contiguous = last - first + 1 == len(index)
        span = slice(self.filled, self.filled + len(index))
        for name, buffer in self._rows.items():
            source = rows[name]
            part = source[first : last + 1] if contiguous else source[index.to(source.device)]
            if self._int8:
                codes, scales = quantize(part)
                buffer[span], self._scales[name][span] = codes.cpu(), scales.cpu()
            else:
                buffer[span] = part.cpu()
        self._provenance[span] = provenance[index.to(provenance.device)].cpu()
        self.filled = span.stop

    def content(self) -> dict[str, Any]:
        """What a shard file holds."""
        content: dict[str, Any] = {"rows": {name: self._used(rows) for name, rows in self._rows.items()}}
        if self._int8:
            content["scales"] = {name: self._used(scales) for name, scales in self._scales.items()}
        return {**content, "provenance": self._used(self._provenance)}

    def document_runs(self) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Runs of consecutive rows of one document: text hashes and lengths, each `(runs,)`."""
        table = self._provenance[: self.filled, :2].numpy()
        starts = np.flatnonzero(np.concatenate([[True], (table[1:] != table[:-1]).any(axis=1)]))
        return table[starts, 0], np.diff(np.append(starts, len(table))).astype(np.int32)

    def _used(self, tensor: Tensor) -> Tensor:
        """The filled part, copied if it is a part: a view would be saved with all that lies behind it."""
        return tensor if self.filled == self.capacity else tensor[: self.filled].clone()
