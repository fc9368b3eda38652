"""Lightning callbacks, one file each."""

from deeplens_lightning.callbacks.single_sample import ExtractSingleSample

__all__ = ["ExtractSingleSample"]
