"""Activations in, batches out: shuffle rows live or from a cache, serve them to a Trainer, keep the position."""
