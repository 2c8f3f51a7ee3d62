"""What a score does not say: what was learnt by heart, what of a benchmark was in the data."""
