"""Run one model batch and select the positions that become rows.

In: packed blocks. Out: a `ModelBatch` with activations, the positions to keep, and the provenance of these rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deeplens_lightning.devices import on_device
from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.text.packing import Blocks, model_inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelBatch:
    """The result of one forward pass over some blocks.

    Attributes:
        activations: `(positions, d_in)` by canonical hook point name, one row for every position of the blocks, in
            the activation dtype, on the model's device.
        kept: int64 `(rows,)` on the CPU, the positions that become rows, ascending.
        provenance: int64 `(rows, 4)` on the CPU, one line for each entry of `kept`; columns as in
            `types.PROVENANCE`.
    """

    activations: dict[str, Tensor]
    kept: Tensor
    provenance: Tensor

    def rows(self) -> dict[str, Tensor]:
        """The kept activations, `(rows, d_in)` by hook point."""
        return {
            name: x.index_select(0, on_device(self.kept, x.device)) for name, x in self.activations.items()
        }


def run_model(model: FrozenModel, blocks: Blocks) -> ModelBatch:
    """Run the model on some blocks, with the inputs that `model.isolation` requires.

    Args:
        model: the frozen model.
        blocks: packed blocks on the CPU, `(n, seq_length)`.
    """
    inputs = model_inputs(blocks, model.isolation)
    read = model.activations(inputs.tokens, inputs.position_ids, inputs.attention_mask)
    length = inputs.tokens.shape[1]
    kept = blocks.keep[:, :length].flatten().nonzero().squeeze(1)
    columns = (blocks.hashes, blocks.documents, blocks.offsets, blocks.tokens)
    return ModelBatch(
        activations={name: x.flatten(0, 1) for name, x in read.items()},
        kept=kept,
        provenance=torch.stack([column[:, :length].flatten()[kept] for column in columns], 1),
    )
