"""Commits on disk, read and written without an engine."""
