"""Puts a model's parameters and states into pages."""
