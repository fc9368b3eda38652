"""Extract the activations of a whole dataset: the DeepLens classes, and caches of shards through `trainer.predict`."""
