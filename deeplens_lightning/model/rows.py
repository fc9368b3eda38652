"""Run one model batch and say which of its positions become rows.

In: packed blocks. Out: activations, the positions to keep, and where each of these rows came from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.text.packing import Blocks, model_inputs


def run_model(model: FrozenModel, blocks: Blocks) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Run one model batch.

    Returns:
        Activations `(positions, d_in)` by hook point; int64 `(rows,)`, the positions that become rows; and their
        provenance, int64 `(rows, 4)` on the CPU.
    """
    inputs = model_inputs(blocks, model.isolation)
    out = {name: x.flatten(0, 1) for name, x in model.activations(**inputs).items()}
    length = inputs["tokens"].shape[1]
    wanted = blocks.keep[:, :length].flatten().nonzero().squeeze(1)
    columns = (blocks.hashes, blocks.documents, blocks.offsets, blocks.tokens)
    provenance = torch.stack([column[:, :length].flatten()[wanted] for column in columns], 1)
    return out, wanted, provenance
