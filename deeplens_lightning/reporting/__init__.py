"""Where what a run learned is written and shown: files, loggers, one HTML page."""
