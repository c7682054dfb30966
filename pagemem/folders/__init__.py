"""Folders and small files of a run: exclusive opening, locks, atomic replacement, identity."""
