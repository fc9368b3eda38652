"""The direction of a latent is what one more unit of it adds to a raw reconstruction."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deeplens_lightning.sae import SparseAutoencoder, SparseAutoencoderGrid
from tests.sae.test_interop import D_IN, D_SAE, raw_rows, trained
from tests.support.synthetic import Rows
from tests.support.training import trainer


@pytest.mark.parametrize("d_in", [D_IN, {"a": D_IN, "b": 10}], ids=["one hook point", "crosscoder"])
@pytest.mark.parametrize("normalize", ["none", "zscore"])
def test_a_direction_is_what_a_unit_of_the_latent_adds(normalize: str, d_in: Any) -> None:
    sae = trained("topk", normalize, d_in)
    latents = torch.rand(4, D_SAE)
    more = latents.clone()
    more[:, 7] += 1
    with torch.no_grad():
        added: Any = sae.decode(more)
        bare: Any = sae.decode(latents)
    found: Any = sae.direction(7)
    for hook in sae.write.hooks:
        one = (x[hook] if isinstance(d_in, dict) else x for x in (added, bare, found))
        after, before, direction = one
        torch.testing.assert_close(after - before, direction.expand_as(after), rtol=1e-3, atol=1e-4)
        assert not direction.requires_grad
        assert direction.dtype == torch.float32


def test_directions_of_an_sae_and_of_a_grid_have_the_norm_of_raw_rows(tmp_path: Any) -> None:
    x = 100 * raw_rows(256)
    grid = SparseAutoencoderGrid(D_IN, {"k": [2, 4]}, {"d_sae": 64})
    trainer(tmp_path, max_steps=2).fit(grid, Rows([x, x]))
    for sae in grid.dictionaries.values():
        unit = float((x - x.mean(0)).norm(dim=1).square().mean().sqrt())
        norm = sae.direction(3).norm()  # type: ignore[union-attr]
        assert float(norm) == pytest.approx(unit, rel=0.05)


@pytest.mark.parametrize("latent", [-1, 64])
def test_a_latent_that_is_not_there_is_refused_with_the_range(latent: int) -> None:
    with pytest.raises(
        ValueError, match=rf"latent={latent} is not in this SAE of 64 latents: give .* 0 to 63"
    ):
        SparseAutoencoder(D_IN, 64, k=2).direction(latent)
