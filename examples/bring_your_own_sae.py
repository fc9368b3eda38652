"""Train a sparse autoencoder of your own: the batches of the data module work with any LightningModule.

python examples/bring_your_own_sae.py
"""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor, nn

from deeplens_lightning import ActivationDataModule


class MySAE(L.LightningModule):
    def __init__(self, d_in: int, d_sae: int, l1: float = 0.02) -> None:
        super().__init__()
        self.encoder, self.decoder, self.l1 = nn.Linear(d_in, d_sae), nn.Linear(d_sae, d_in), l1

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        latents = torch.relu(self.encoder(batch - self.decoder.bias))
        loss = (self.decoder(latents) - batch).square().mean() + self.l1 * latents.abs().mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        error = self.decoder(torch.relu(self.encoder(batch - self.decoder.bias))) - batch
        self.log("val/fvu", error.square().sum() / (batch - batch.mean(0)).square().sum(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main(steps: int = 200) -> float:
    dm = ActivationDataModule(
        "demo:lm", layer=3, hook="mlp_out", dataset_name="demo:docs", normalize="standardize"
    )
    trainer = L.Trainer(max_steps=steps, val_check_interval=steps, logger=False, enable_checkpointing=False)
    trainer.fit(MySAE(dm.d_in, 8 * dm.d_in), dm)  # type: ignore[operator,arg-type]
    return float(trainer.callback_metrics["val/fvu"])


if __name__ == "__main__":
    print(f"held-out FVU {main():.3f}")
