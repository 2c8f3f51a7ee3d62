"""Recipes of training beyond pretraining; the launch command stands in each docstring."""
