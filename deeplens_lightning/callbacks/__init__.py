"""Lightning callbacks, one file each."""

from deeplens_lightning.callbacks.loss_recovered import LossRecovered
from deeplens_lightning.callbacks.single_sample import ExtractSingleSample

__all__ = ["ExtractSingleSample", "LossRecovered"]
