"""Memory-map a `.pt` file of activations without executing code in it.

In: a local path. Out: an `OpenShard` from which rows are gathered. There are two kinds of files: shards of a cache
(`{"rows": ..., "provenance": ...}`), and one bare tensor `(n, d_in)` as DeepLens saves it.
"""

from __future__ import annotations

import pickle
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deeplens_lightning.shards.errors import DamagedShardError, ShardError
from deeplens_lightning.shards.format import DTYPES, UNNAMED, Rows
from deeplens_lightning.types import PROVENANCE

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

UNKNOWN = -1
"""Value of the provenance columns of bare tensors, which have no provenance."""

_DEEPLENS = re.compile(r"features_layer_(\d+)_\d+\.pt")
_UNREADABLE = (
    OSError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, AssertionError,
    OverflowError, MemoryError, struct.error,
)  # fmt: skip
"""All that torch's zip reader and restricted unpickler raise on bytes that are not tensors (found by flipping bytes)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenShard:
    """Rows and provenance of a memory-mapped shard.

    Attributes:
        rows: `(n, d_in)` by hook name, in the activation dtype or int8.
        scales: float32 `(n,)` by hook name if rows are int8, else empty.
        provenance: int64 `(n, 4)`; all -1 for a bare tensor.
    """

    rows: Mapping[str, Tensor]
    scales: Mapping[str, Tensor]
    provenance: Tensor


def open_shard(path: Path, hook_points: Mapping[str, Rows], storage: str, rows: int) -> OpenShard:
    """Memory-map a shard of a cache and check that it holds what its manifest and sidecar say.

    Args:
        path: path of the shard.
        hook_points: `Rows` by canonical hook name, from the manifest.
        storage: `exact` or `int8`, from the manifest.
        rows: number of rows, from the sidecar.

    Raises:
        DamagedShardError: it holds something else, cannot be read, or holds Python objects other than tensors.
    """
    content = load_mapped(path)
    parts = content.keys() if isinstance(content, dict) else None
    if parts is None or not {"rows", "provenance"} <= parts or not isinstance(content["rows"], dict):
        raise DamagedShardError(
            f"{path} holds {describe(content)}, not a shard of activations: copy it again, or delete it "
            "and run the command that wrote it again"
        )
    known = {"rows", "provenance", "scales"} if storage == "int8" else {"rows", "provenance"}
    if not parts <= known or set(content["rows"]) != set(hook_points):
        raise DamagedShardError(
            f"{path} has rows of {sorted(map(str, content['rows']))}, its manifest says {sorted(hook_points)}"
        )
    scales: dict[str, Tensor] = {}
    for name, want in hook_points.items():
        dtype = torch.int8 if storage == "int8" else DTYPES[want.dtype]
        _check_tensor(path, name, content["rows"][name], (rows, want.d_in), dtype)
        if storage == "int8":
            given = content.get("scales")
            value: Any = given.get(name) if isinstance(given, dict) else None
            _check_tensor(path, f"scales of {name}", value, (rows,), torch.float32)
            scales[name] = value
    _check_tensor(path, "provenance", content["provenance"], (rows, 4), torch.int64)
    rows_of = {name: content["rows"][name].detach() for name in hook_points}
    return OpenShard(rows=rows_of, scales=scales, provenance=content["provenance"])


def open_bare(path: Path, hook: str | None, expected: tuple[int, int] | None = None) -> OpenShard:
    """Memory-map a bare activation tensor `(n, d_in)`.

    Args:
        path: a file written by `torch.save(tensor, path)`.
        hook: canonical hook name for its rows; by default read from DeepLens's file names
            (`features_layer_3_25000.pt` is `layers.3.mlp_act`), else `UNNAMED`.
        expected: the shape that it must have; None for any shape.

    Raises:
        ShardError: the file holds something else than one tensor `(n, d_in)` of a known dtype, or `hook` is of another
            layer than its name.
        DamagedShardError: the file is missing, cannot be read, or has another shape than `expected`.
    """
    content = load_mapped(path)
    if not isinstance(content, Tensor) or not _is_plain(content):
        raise ShardError(
            f"{path} holds {describe(content)}; give one activation tensor of shape (rows, d_in) per file, "
            "or the folder that `deeplens-lightning extract` wrote"
        )
    if content.ndim != 2 or not content.numel():
        raise ShardError(
            f"{path} holds a tensor of shape {tuple(content.shape)}, expected (rows, d_in) with at least one "
            "row: save `x.reshape(-1, x.shape[-1])`"
        )
    if content.dtype not in DTYPES.values():
        raise ShardError(
            f"{path} holds {content.dtype}, expected {', '.join(DTYPES)}: save `x.float()` instead"
        )
    if not _is_stored(content):
        raise ShardError(
            f"{path} holds a tensor of shape {tuple(content.shape)} and only {content.untyped_storage().nbytes():,} "
            "bytes of it (an expanded or negated view): torch.save(x.clone(memory_format=torch.contiguous_format), path)"
        )
    match = _DEEPLENS.fullmatch(path.name)
    if (
        hook is not None
        and match
        and hook.startswith("layers.")
        and not hook.startswith(f"layers.{match[1]}.")
    ):
        raise ShardError(
            f"{path} has the name of a file of layer {match[1]}, but layer= and hook= call its rows {hook!r}: give "
            f"layer={match[1]}, leave both out, or rename the file"
        )
    name = hook or (f"layers.{match[1]}.mlp_act" if match else UNNAMED)
    if expected is not None and (len(content), content.shape[1]) != expected:
        raise DamagedShardError(
            f"{path} was changed while it was in use: it held a tensor of shape {expected} and holds "
            f"{describe(content)} now; start again"
        )
    return OpenShard(rows={name: content.detach()}, scales={}, provenance=unknown_provenance(len(content)))


def unknown_provenance(rows: int) -> Tensor:
    """The provenance of rows without one: int64 `(rows, 4)`, all `UNKNOWN`, in the memory of one row."""
    return torch.full((1, len(PROVENANCE)), UNKNOWN).expand(rows, -1)


def load_mapped(path: Path) -> Any:
    """Load a file with `torch.load`: tensors stay on disk, and only tensors and plain containers are allowed.

    Raises:
        DamagedShardError: the file is missing, cannot be read, or holds other Python objects.
    """
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError as error:
        raise DamagedShardError(f"{path} is missing") from error
    except pickle.UnpicklingError as error:
        raise DamagedShardError(
            f"{path} is refused: it holds Python objects other than tensors, or is damaged; nothing in it "
            f"was executed ({str(error).splitlines()[0] if str(error) else 'unreadable'})"
        ) from error
    except _UNREADABLE as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        legacy = " (saved in the legacy format? load it and torch.save it again)" if "mmap" in reason else ""
        raise DamagedShardError(f"{path} cannot be read as tensors: {reason}{legacy}") from error


def describe(content: Any) -> str:
    """Describe the content of a file in a few words, for messages."""
    if isinstance(content, Tensor):
        if _is_plain(content):
            return f"a tensor of shape {tuple(content.shape)}"
        kind = "nested" if content.is_nested else "quantized" if content.is_quantized else str(content.layout)
        where = "" if content.device.type == "cpu" else f" on the device {content.device.type}"
        return f"a tensor that is not a plain one ({kind.removeprefix('torch.')}, {type(content).__name__}{where})"
    if isinstance(content, dict):
        names = ", ".join(repr(key) for key in list(content)[:4])
        more = ", ..." if len(content) > 4 else ""
        return f"a dict with keys {names}{more}" + (" (a model checkpoint?)" if len(content) > 1 else "")
    return f"a {type(content).__name__}"


def _check_tensor(path: Path, name: str, value: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if not isinstance(value, Tensor) or not _is_plain(value) or not _is_stored(value):
        raise DamagedShardError(
            f"{path}: {name} is {describe(value)}, expected a plain tensor, whole in the file"
        )
    if tuple(value.shape) != shape or value.dtype != dtype:
        raise DamagedShardError(
            f"{path}: {name} is {value.dtype} {tuple(value.shape)}, its manifest says {dtype} {shape}: copy it again, or "
            "delete it and run the command that wrote it again"
        )


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is a strided one on the CPU, of no other class, so that its elements can be read from memory."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_nested and not tensor.is_quantized
    return plain and tensor.layout is torch.strided and tensor.device.type == "cpu"


def _is_stored(tensor: Tensor) -> bool:
    """Whether every element has its own place in the file, which an expanded tensor lacks, and is stored as it is."""
    nbytes = tensor.numel() * tensor.element_size()
    return nbytes <= tensor.untyped_storage().nbytes() and not tensor.is_neg() and not tensor.is_conj()
