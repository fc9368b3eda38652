"""Gather rows from many tensors with one call, as from one large tensor.

In: tensors `(n, d)` of one dtype and width, for example the rows of memory-mapped shards. Out: copies of any of their
rows.

`torch.index_select` copies rows of one tensor. One call for each shard, of which a shuffled batch has only a few rows,
costs more time than the copying itself. Therefore the memory of all tensors is seen as one tensor of bytes with
overlapping rows: row `i` begins `i * step` bytes after the lowest address. `step` divides the distance between any two
rows, so every row of every tensor is one of those rows. Bytes between the tensors belong to no row and are never read.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from math import gcd

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deeplens_lightning.shards.codec import dequantize
from deeplens_lightning.shards.tensors import OpenShard

Integers = NDArray[np.int64]

_UNITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by size in bytes. The largest that fits is used: `index_select` shares long rows among threads badly."""


class JoinedRows:
    """Rows of several tensors, gathered with one call. The tensors are kept in memory as long as this object.

    Args:
        tensors: `(n, d)` on the CPU, of one dtype and width, by number from 0. A tensor whose rows are not contiguous (a
            transposed one) is copied.

    Raises:
        ValueError: the tensors have different dtypes or widths.
    """

    def __init__(self, tensors: Mapping[int, Tensor]) -> None:
        if len(kinds := {(tensor.dtype, tensor.shape[1]) for tensor in tensors.values()}) != 1:
            raise ValueError(f"tensors of one dtype and width can be joined, got {kinds}")
        tensors = {
            number: tensor if tensor.stride(1) == 1 else tensor.contiguous()
            for number, tensor in tensors.items()
        }
        self._tensors, given = tensors, list(tensors.values())
        size, width = given[0].element_size(), given[0].shape[1] * given[0].element_size()
        first = min(tensor.data_ptr() for tensor in given)
        end = max(tensor.data_ptr() + (len(tensor) - 1) * tensor.stride(0) * size + width for tensor in given)
        starts = {number: tensor.data_ptr() - first for number, tensor in tensors.items()}
        strides = {number: tensor.stride(0) * size for number, tensor in tensors.items()}
        step = gcd(width, *starts.values(), *strides.values())
        self._starts, self._strides, self._lengths = np.zeros((3, max(tensors) + 1), np.int64)
        for number, tensor in tensors.items():
            self._starts[number], self._strides[number] = starts[number] // step, strides[number] // step
            self._lengths[number] = len(tensor)
        memory = torch.frombuffer((ctypes.c_char * (end - first)).from_address(first), dtype=torch.uint8)
        joined = memory.as_strided(((end - first - width) // step + 1, width), (step, 1))
        self._unit = _UNITS[gcd(step, 8)]
        self._joined = joined.view(self._unit)

    def take(self, numbers: Integers, rows: Integers, out: Tensor) -> Tensor:
        """Copy row `rows[i]` of the tensor `numbers[i]` to `out[i]`, for every i.

        Args:
            numbers: numbers of tensors, int64 `(m,)`.
            rows: int64 `(m,)`, each from 0 to the length of its tensor minus 1.
            out: contiguous `(m, d)` of the dtype of the tensors.

        Returns:
            `out`.

        Raises:
            IndexError: a tensor has no such row. Torch cannot check this: between the tensors is memory of others.
        """
        if (
            rows.view(np.uint64) >= self._lengths.take(numbers).view(np.uint64)
        ).any():  # as unsigned numbers, negative ones are larger than any length
            raise IndexError("a row number is beyond the rows of its tensor")
        index = self._strides.take(numbers)
        index *= rows
        index += self._starts.take(numbers)
        torch.index_select(self._joined, 0, torch.from_numpy(index), out=out.view(self._unit))
        return out


class JoinedShards:
    """Rows and provenance of several memory-mapped shards, gathered with one call each.

    Args:
        shards: open shards by number; they may differ in storage.
        hooks: hook names of the rows to gather.

    Attributes:
        provenance: int64 `(n, 4)` of each shard.
    """

    def __init__(self, shards: Mapping[int, OpenShard], hooks: Sequence[str]) -> None:
        self.provenance = JoinedRows({number: shard.provenance for number, shard in shards.items()})
        exact = {number: shard for number, shard in shards.items() if not shard.scales}
        coded = {number: shard for number, shard in shards.items() if shard.scales}
        self._is_coded = np.zeros(max(shards) + 1, bool)
        self._is_coded[list(coded)] = True
        self._exact = {hook: _joined_rows(exact, hook) for hook in hooks if exact}
        self._codes = {hook: _joined_rows(coded, hook) for hook in hooks if coded}
        self._scales = {
            hook: JoinedRows({number: shard.scales[hook].unsqueeze(1) for number, shard in coded.items()})
            for hook in hooks
            if coded
        }

    def take(self, hook: str, numbers: Integers, rows: Integers, out: Tensor) -> Tensor:
        """Copy the row `rows[i]` of shard `numbers[i]` to `out[i]`, for every i.

        Args:
            hook: hook name of the rows.
            numbers: numbers of shards, int64 `(m,)`.
            rows: int64 `(m,)`, each below the number of rows of its shard.
            out: contiguous `(m, d_in)` in the activation dtype.

        Returns:
            `out`.
        """
        if not self._codes:
            return self._exact[hook].take(numbers, rows, out)
        coded = np.flatnonzero(self._is_coded[numbers])
        exact = np.flatnonzero(~self._is_coded[numbers])
        if len(exact):
            kept = self._exact[hook].take(
                numbers[exact], rows[exact], out.new_empty(len(exact), out.shape[1])
            )
            out[torch.from_numpy(exact)] = kept
        codes = torch.empty(len(coded), out.shape[1], dtype=torch.int8)
        self._codes[hook].take(numbers[coded], rows[coded], codes)
        scales = self._scales[hook].take(numbers[coded], rows[coded], torch.empty(len(coded), 1))
        out[torch.from_numpy(coded)] = dequantize(codes, scales.squeeze(1), out.dtype)
        return out


def _joined_rows(shards: Mapping[int, OpenShard], hook: str) -> JoinedRows:
    return JoinedRows({number: shard.rows[hook] for number, shard in shards.items()})
