"""The classes that DeepLens users import from `deeplens.extractor`.

`from deeplens.extractor import FromHuggingFace` becomes `from deeplens_lightning.extractor import FromHuggingFace`.
"""

from deeplens_lightning.callbacks.single_sample import ExtractSingleSample
from deeplens_lightning.extraction.from_huggingface import FromHuggingFace
from deeplens_lightning.extraction.notebook import ActivationExtractor

__all__ = ["ActivationExtractor", "ExtractSingleSample", "FromHuggingFace"]
