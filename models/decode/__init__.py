"""Ids, log-probabilities and text from a model."""
