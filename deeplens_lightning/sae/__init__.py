"""Sparse autoencoders: the dictionary itself, LightningModules that train it, import and export."""

from deeplens_lightning.sae.dictionary import Dictionary
from deeplens_lightning.sae.grid import SparseAutoencoderGrid
from deeplens_lightning.sae.module import SparseAutoencoder
from deeplens_lightning.sae.prediction import SparseLatents
from deeplens_lightning.sae.saelens_module import SAELensModule
from deeplens_lightning.sae.schedule import Optimization

__all__ = [
    "Dictionary",
    "Optimization",
    "SAELensModule",
    "SparseAutoencoder",
    "SparseAutoencoderGrid",
    "SparseLatents",
]
