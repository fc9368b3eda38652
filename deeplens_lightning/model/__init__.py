"""Blocks in, activations out: find hook points, load the model up to the deepest one, run it, select rows."""
