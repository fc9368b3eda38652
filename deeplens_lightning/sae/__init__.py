"""Sparse autoencoders as LightningModules: the reference model, and doors to other libraries."""

from deeplens_lightning.sae.module import SparseAutoencoder
from deeplens_lightning.sae.schedule import Optimization

__all__ = ["Optimization", "SparseAutoencoder"]
