"""Blocks in, activations out: find hook points, load the frozen model up to the deepest one, run it, keep rows."""
