"""Train sparse autoencoders on a language model's activations: a LightningDataModule, SAEs, callbacks, extraction."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deeplens_lightning.callbacks.single_sample import ExtractSingleSample
    from deeplens_lightning.datamodule import ActivationDataModule
    from deeplens_lightning.extraction.from_huggingface import FromHuggingFace
    from deeplens_lightning.extraction.latent_contexts import top_contexts
    from deeplens_lightning.extraction.notebook import ActivationExtractor
    from deeplens_lightning.reporting.figures import plot_activation_heatmap
    from deeplens_lightning.sae import SparseAutoencoder, SparseAutoencoderGrid

_HOMES = {
    "ActivationDataModule": "datamodule",
    "ActivationExtractor": "extraction.notebook",
    "ExtractSingleSample": "callbacks.single_sample",
    "FromHuggingFace": "extraction.from_huggingface",
    "SparseAutoencoder": "sae",
    "SparseAutoencoderGrid": "sae",
    "plot_activation_heatmap": "reporting.figures",
    "top_contexts": "extraction.latent_contexts",
}

__all__ = [
    "ActivationDataModule",
    "ActivationExtractor",
    "ExtractSingleSample",
    "FromHuggingFace",
    "SparseAutoencoder",
    "SparseAutoencoderGrid",
    "plot_activation_heatmap",
    "top_contexts",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `deeplens-lightning --help` does not import torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return resolve_name(f"{__name__}.{_HOMES[name]}:{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
