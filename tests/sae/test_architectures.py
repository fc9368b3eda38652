"""Architectures from names and settings."""

from __future__ import annotations

import pytest

from deeplens_lightning.sae import SparseAutoencoder, SparseAutoencoderGrid


def test_settings_without_the_name_of_an_architecture_are_refused() -> None:
    message = (
        r"architecture=\{'aux_k': 4\} has no name: give one, as in \{'name': 'topk', 'aux_k': 4\}; the names are "
        "relu, topk, batch_topk, jumprelu, gated, matryoshka"
    )
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder(8, 32, k=2, architecture={"aux_k": 4})
    with pytest.raises(ValueError, match=message):
        SparseAutoencoderGrid(8, {"architecture": [{"aux_k": 4}, "topk"]}, {"d_sae": 32, "k": 2})
