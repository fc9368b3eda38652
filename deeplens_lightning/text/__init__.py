"""Turn a dataset into blocks of tokens: open it, order its documents, assign them to ranks, tokenise, pack."""
