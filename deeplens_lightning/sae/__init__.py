"""Sparse autoencoders as LightningModules: the reference model, sweeps of it, doors to other libraries."""

from deeplens_lightning.sae.grid import SparseAutoencoderGrid
from deeplens_lightning.sae.interop.saelens_module import SAELensModule
from deeplens_lightning.sae.module import SparseAutoencoder
from deeplens_lightning.sae.schedule import Optimization

__all__ = ["Optimization", "SAELensModule", "SparseAutoencoder", "SparseAutoencoderGrid"]
