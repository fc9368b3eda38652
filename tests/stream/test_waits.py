"""The stream on an accelerator without data: mixing and serving take no wait and no tensor of another device."""

from __future__ import annotations

from itertools import cycle, islice

import torch

from deeplens_lightning.model.rows import ModelBatch
from deeplens_lightning.normalization import Scaling
from deeplens_lightning.stream.arrivals import BlockArrivals, RowArrivals
from deeplens_lightning.stream.computed_batches import ComputedBatch
from deeplens_lightning.stream.loader import finish
from deeplens_lightning.stream.rotating_shuffle import RotatingShuffle
from deeplens_lightning.types import PROVENANCE, BlockPosition, RowPosition
from tests.support.fake_accelerator import fake_accelerator, forked, refuse_copies


@forked
def test_mixing_and_serving_rows_does_not_wait() -> None:
    scaling = Scaling(torch.ones(8), torch.full((8,), 2.0))
    kept = torch.arange(0, 60, 2)
    provenance = torch.zeros(len(kept), len(PROVENANCE), dtype=torch.int64)
    shuffle = RotatingShuffle(batch_size=16, capacity=96, first_window=32, entropy=(0,))
    with fake_accelerator() as device:
        out = ModelBatch(
            activations={"resid": torch.randn(60, 8, device=device)}, kept=kept, provenance=provenance
        )
        batch = ComputedBatch(group=BlockPosition(), number=0, out=out, tokens=60, outliers=0)
        buffers = [torch.empty(97, 8, device=device), torch.empty(96, len(PROVENANCE), dtype=torch.int64)]
        rows = RowArrivals(
            blocks=BlockArrivals(iter(()), BlockPosition()),
            computed=cycle([batch]),
            buffers=buffers,
            writer=None,
            start=RowPosition(blocks=BlockPosition()),
            enter=False,
        )
        scaling.apply(buffers[0])  # copies the constants to the device, once
        with refuse_copies():
            for mixed in islice(shuffle.serve(buffers, rows), 40):
                served = finish({"resid": mixed.tensors[0]}, {"resid": scaling}, torch.float32)
                assert isinstance(served, torch.Tensor)
                assert served.device == device
