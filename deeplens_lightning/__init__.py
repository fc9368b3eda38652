"""A LightningDataModule whose batches are a language model's activations."""
