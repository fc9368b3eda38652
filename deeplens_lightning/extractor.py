"""The names of DeepLens's `deeplens.extractor`, so that a tutorial changes one word of its import line."""

from deeplens_lightning.callbacks.single_sample import ExtractSingleSample
from deeplens_lightning.extraction.from_huggingface import FromHuggingFace
from deeplens_lightning.extraction.notebook import ActivationExtractor

__all__ = ["ActivationExtractor", "ExtractSingleSample", "FromHuggingFace"]
