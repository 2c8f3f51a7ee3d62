"""Programs that a model has written, run where they can reach nothing."""
