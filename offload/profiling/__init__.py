"""Profiles of a run and of a plain PyTorch loop, and their reports."""
