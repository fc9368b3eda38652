"""Documents in, blocks out: open a dataset, order and deal its documents, tokenise, pack segments into blocks."""
