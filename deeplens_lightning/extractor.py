"""Export the classes that DeepLens has in `deeplens.extractor` under the same names.

Replace `from deeplens.extractor import FromHuggingFace` by `from deeplens_lightning.extractor import FromHuggingFace`.
"""

from deeplens_lightning.callbacks.single_sample import ExtractSingleSample
from deeplens_lightning.extraction.from_huggingface import FromHuggingFace
from deeplens_lightning.extraction.notebook import ActivationExtractor

__all__ = ["ActivationExtractor", "ExtractSingleSample", "FromHuggingFace"]
