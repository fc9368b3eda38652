"""Write and show the results of a run: figures, loggers, files in the run's folder, and one HTML page."""
