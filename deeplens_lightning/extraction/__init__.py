"""Activations in bulk: the DeepLens classes, and caches written by `trainer.predict`."""
