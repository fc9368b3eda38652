"""Turn activations into batches: shuffle rows, live or from a cache, serve them to a Trainer, track the position."""
