"""Read and write files: typed records from JSON-like values, and writes that appear whole or not at all."""
