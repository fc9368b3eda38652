"""Fit on two ranks with every callback: test_callbacks_on_ranks.py runs this script, Lightning runs it for rank 1."""

import sys

import lightning as L
from lightning.pytorch.loggers import CSVLogger

from deeplens_lightning import ActivationDataModule, SparseAutoencoder
from deeplens_lightning.callbacks import (
    ExtractSingleSample,
    FitSummary,
    LatentStatistics,
    LossRecovered,
    Throughput,
    TopActivatingTokens,
)


def main(folder: str, texts: str, root: str) -> None:
    """Fit on two CPU processes."""
    datamodule = ActivationDataModule(
        folder,
        layer=1,
        hook="mlp_act",
        dataset_name=texts,
        seq_length=64,
        batch_size=32,
        inference_batch_size=2,
        buffer_size=128,
        max_tokens=2 * 10 * 32,
        val_fraction=0.2,
        val_rows=400,
        normalize="standardize",
    )
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        strategy="ddp",
        devices=2,
        logger=CSVLogger(root),
        log_every_n_steps=5,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            ExtractSingleSample(texts=["The cat sat on the mat."], every_n_steps=5),
            LossRecovered(100),
            LatentStatistics(every_n_steps=3),
            TopActivatingTokens(latents=16, every_n_steps=2),
            Throughput(),
            FitSummary(),
        ],
    )
    trainer.fit(SparseAutoencoder(d_in=datamodule.d_in, d_sae=256, k=8), datamodule)


if __name__ == "__main__":
    main(*sys.argv[1:])
