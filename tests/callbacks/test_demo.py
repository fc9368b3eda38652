"""On the embedded model: CE recovered of known SAEs, and the code of the tutorial and the notebook."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch

from deeplens_lightning import (
    ActivationDataModule,
    ActivationExtractor,
    ExtractSingleSample,
    SparseAutoencoder,
    plot_activation_heatmap,
)
from deeplens_lightning.callbacks import FitSummary, LossRecovered


class _Fixed(SparseAutoencoder):
    """An SAE whose reconstruction is its input times a constant."""

    factor = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def _recovered(sae: L.LightningModule, datamodule: ActivationDataModule, tmp_path: Path, steps: int) -> float:
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[LossRecovered(2000), FitSummary()],
    )
    trainer.fit(sae, datamodule)
    return float(trainer.callback_metrics["val/ce_recovered"])


def test_identity_gives_1_zero_gives_0_and_a_trained_sae_lies_in_between(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    datamodule = ActivationDataModule(layer=0, hook="mlp_out", batch_size=512, buffer_size=4096)
    d_in = datamodule.d_in
    identity = _Fixed(d_in, d_sae=64, k=2)
    assert _recovered(identity, datamodule, tmp_path, 1) == 1.0
    zero = _Fixed(d_in, d_sae=64, k=2)
    zero.factor = 0.0
    assert _recovered(zero, datamodule, tmp_path, 1) == 0.0
    trained = SparseAutoencoder(d_in, d_sae=768, k=32)
    assert 0.2 < _recovered(trained, datamodule, tmp_path, 30) < 1.0
    assert "CE recovered" in capsys.readouterr().out


def test_the_tutorials_single_sample_on_the_embedded_model() -> None:
    extractor = ExtractSingleSample(hf_model="demo:lm", layer=3, max_length=1024, device="auto")
    text = "The capital of France is Paris."
    activations = extractor.get_mlp_acts(text)
    tokens = extractor.tokenizer.tokenize(text)
    assert activations.shape == (len(tokens), ActivationDataModule(layer=3).d_in)


def test_the_notebooks_cells_on_the_embedded_model(tmp_path: Path) -> None:
    extractor = ActivationExtractor(model_name="demo:lm", device="cpu")
    result = extractor.get_activations("The cat sat on the mat.")
    assert result["activations"].shape[:2] == (1, len(result["tokens"]))
    assert result["activations"].shape[-1] == ActivationDataModule(hook="final_norm", layer=None).d_in
    title = "GPT-2 Activations: 'The cat sat on the mat.'"
    plot_activation_heatmap(result["activations"][0], result["tokens"], title, path=tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 5000
