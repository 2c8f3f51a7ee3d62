"""Checkpoints of others <-> puna's parameter tree; one declarative table per format."""
