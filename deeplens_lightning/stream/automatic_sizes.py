"""Choose sizes: rows in the shuffle buffer, blocks in a model batch, rows for validation.

In: the setting, what `auto` depends on, and the number in a checkpoint. Out: a number, and a message where it is not the
one that was asked for. The same configuration gives the same number on every machine; only the blocks in a model batch
depend on the kind of device.
"""

from __future__ import annotations

from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from deeplens_lightning.model.frozen import FrozenModel

MAX_BUFFER_ROWS = 262_144
MAX_BUFFER_BYTES = 10**9
LEAST_BUFFER_BATCHES = 4
CPU_TOKENS, ACCELERATOR_TOKENS = 2048, 16_384


def row_bytes(model: FrozenModel) -> int:
    """Bytes of a row of all hook points, in the activation dtype."""
    return sum(point.d_in * model.dtypes[point.name].itemsize for point in model.hook_points)


def buffer_rows(
    given: int | Literal["auto"], *, row_bytes: int, batch_size: int, saved: int | None = None
) -> int:
    """Number of slots of the shuffle buffer, a multiple of `batch_size`.

    Args:
        given: the setting; `auto` is at most `MAX_BUFFER_ROWS` rows and `MAX_BUFFER_BYTES` bytes, but at least
            `LEAST_BUFFER_BATCHES` batches.
        row_bytes: bytes of a row of all hook points, in the activation dtype.
        batch_size: rows per batch.
        saved: the number in the checkpoint that the run continues from, which is kept; None for a new run.

    Raises:
        ValueError: a batch does not fit, because a tuner raised `batch_size`.
    """
    if given != "auto" and given < batch_size:
        raise ValueError(
            f"batch_size={batch_size} rows do not fit in buffer_size={given} rows, where they are shuffled: give a "
            f'multiple of the largest batch to try, such as buffer_size={16 * batch_size}, or "auto"; or let '
            f"BatchSizeFinder stop earlier, with max_val={given}"
        )
    if given == "auto":
        rows = min(MAX_BUFFER_ROWS, MAX_BUFFER_BYTES // row_bytes)
        rows = max(rows // batch_size, LEAST_BUFFER_BATCHES) * batch_size
    else:
        rows = given // batch_size * batch_size
    if saved is None or saved == rows:
        return rows
    rank_zero_info(
        f"the shuffle buffer keeps the {saved} rows of the checkpoint, and with them the order of the batches; "
        f"buffer_size={given} would have {rows} rows in a new run"
    )
    return saved


def model_batch_blocks(
    given: int | Literal["auto"], *, seq_length: int, device: torch.device, saved: int | None = None
) -> int:
    """Number of blocks in a model batch, at least 1.

    Args:
        given: the setting; `auto` makes a model batch of `ACCELERATOR_TOKENS` tokens, on a CPU of `CPU_TOKENS`.
        seq_length: tokens in a block.
        device: device of the model.
        saved: the number in the checkpoint that the run continues from, which `auto` keeps; None for a new run.
    """
    if given != "auto":
        return given
    blocks = max((CPU_TOKENS if device.type == "cpu" else ACCELERATOR_TOKENS) // seq_length, 1)
    if saved is None or saved == blocks:
        return blocks
    rank_zero_info(
        f'inference_batch_size="auto" keeps the {saved} blocks of the checkpoint; a new run would have {blocks} here'
    )
    return saved


def validation_rows(given: int, *, max_bytes: int, row_bytes: int) -> int:
    """Largest number of rows in the validation set: as many as given, or as fit in `max_bytes`, but at least 1."""
    fitting = max(max_bytes // row_bytes, 1)
    if fitting >= given:
        return given
    rank_zero_warn(
        f"val_rows={given} rows of {row_bytes:,} bytes do not fit in buffer_options.val_bytes={max_bytes:,}: the "
        f"validation set keeps at most {fitting} rows. Raise val_bytes to keep more, or lower val_rows"
    )
    return fitting
