"""Save the tensor that `FromHuggingFace` extracts: its file name, the space that it needs, and files for large ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import count
from math import inf
from pathlib import Path

import torch
from torch import Tensor

from deeplens_lightning.disk.files import TEMPORARY, create, make_folder, remove, write_whole
from deeplens_lightning.model.hook_points import HookPoint
from deeplens_lightning.shards.errors import DamagedShardError
from deeplens_lightning.shards.folder import LocalFolder
from deeplens_lightning.shards.shard_stream import machine_memory
from deeplens_lightning.shards.tensors import load_mapped

FOLDER = Path("saved_features")


class Room:
    """The memory and the disk space that a tensor of features may take.

    Args:
        save: whether the tensor is saved in `FOLDER`. Only then it may be larger than `memory`: it is written to a file
            and mapped from it, and takes twice its size on the disk meanwhile.

    Attributes:
        memory: bytes of the largest tensor that is kept in memory: half of this machine's memory.
        largest: bytes of the largest tensor that can be made.
    """

    def __init__(self, save: bool) -> None:
        free = LocalFolder(FOLDER).free_bytes() if save else None
        self.memory = machine_memory() // 2
        self._save, self._disk = save, inf if free is None else free
        self.largest = max(min(self.memory, self._disk), self._disk / 2) if save else self.memory

    def too_large(self, nbytes: float, samples: int) -> ValueError:
        """The error for a tensor of about this number of bytes from a number of samples."""
        limits, mapped = f"half of this machine's memory is {gigabytes(self.memory)}", ""
        if not self._save:
            mapped = "give save_features=True, which maps the tensor from its file; "
        elif self._disk < inf:
            limits += f", and a larger tensor needs twice its size in {FOLDER}, where {gigabytes(self._disk)} are free"
        return ValueError(
            f"the features of {samples:,} samples take about {gigabytes(nbytes)}, and {limits}: iterate over "
            "extract_features_batched(), which yields them in pieces; or write shards with `deeplens-lightning extract`, "
            f"which SAEs train on; {mapped}or lower num_samples or seq_length"
        )


def save(features: Tensor, point: HookPoint) -> Path:
    """Save a tensor under the name of its hook point and its number of rows; a file with other content is kept.

    Args:
        features: `(rows, d_in)`.
        point: the hook point that they were read at.

    Returns:
        The path. If files with other content have the name, it ends in `-2`, `-3`, …
    """
    path = next(path for path in _paths(point, len(features)) if not path.exists() or _holds(path, features))
    if not path.exists():
        write_whole(path, lambda file: torch.save(features, file))
    return path


def save_pieces(pieces: Iterable[Tensor], rows: int, point: HookPoint) -> tuple[Path, Tensor]:
    """Save a tensor that is larger than memory, and map it from its file.

    Args:
        pieces: `(n, d_in)` on the CPU, the rows of the tensor in their order.
        rows: number of rows of all pieces, at least 1.
        point: the hook point that they were read at.

    Returns:
        The path as of `save`, and the tensor `(rows, d_in)`; changes of the tensor do not change the file.
    """
    unfinished = FOLDER / f"{TEMPORARY}rows-of-{_name(point, rows)}"
    make_folder(FOLDER)
    try:
        dtype = torch.float32
        with create(unfinished) as file:
            for piece in pieces:
                dtype = piece.dtype
                file.write(piece.contiguous().view(torch.uint8).numpy().data)
        flat = torch.from_file(str(unfinished), shared=False, size=rows * point.d_in, dtype=dtype)
        path = save(flat.view(rows, point.d_in), point)
        del flat
    finally:
        remove(unfinished)
    features: Tensor = load_mapped(path)
    return path, features


def gigabytes(nbytes: float) -> str:
    """A number of bytes in GB, for messages."""
    return f"{nbytes / 1e9:,.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e9:.2g} GB"


def _name(point: HookPoint, rows: int) -> str:
    """The file name that DeepLens uses for MLP activations; for other hook points a name with theirs."""
    if point.name == f"layers.{point.layer}.mlp_act":
        return f"features_layer_{point.layer}_{rows}"
    return f"features_{point.name.replace(':', '_')}_{rows}"


def _paths(point: HookPoint, rows: int) -> Iterator[Path]:
    name = _name(point, rows)
    yield FOLDER / f"{name}.pt"
    for number in count(2):
        yield FOLDER / f"{name}-{number}.pt"


def _holds(path: Path, features: Tensor) -> bool:
    """Whether a file holds this tensor; every value is compared."""
    try:
        there = load_mapped(path)
    except DamagedShardError:
        return False
    return (
        isinstance(there, Tensor)
        and (there.dtype, there.shape) == (features.dtype, features.shape)
        and torch.equal(there.view(torch.uint8), features.view(torch.uint8))  # also where both are NaN
    )
