"""Lightning callbacks that measure, show and save a training run, one file for each."""

from deeplens_lightning.callbacks.export_sae import ExportSAE
from deeplens_lightning.callbacks.latent_prediction_writer import LatentPredictionWriter
from deeplens_lightning.callbacks.latent_statistics import LatentStatistics
from deeplens_lightning.callbacks.loss_recovered import LossRecovered
from deeplens_lightning.callbacks.single_sample import ExtractSingleSample
from deeplens_lightning.callbacks.stream_statistics import StreamStatistics
from deeplens_lightning.callbacks.summary import FitSummary
from deeplens_lightning.callbacks.throughput import Throughput
from deeplens_lightning.callbacks.top_tokens import TopActivatingTokens
from deeplens_lightning.preemption import Preemption

__all__ = [
    "ExportSAE",
    "ExtractSingleSample",
    "FitSummary",
    "LatentPredictionWriter",
    "LatentStatistics",
    "LossRecovered",
    "Preemption",
    "StreamStatistics",
    "Throughput",
    "TopActivatingTokens",
]
