"""Checks and changes of a model's modules."""
