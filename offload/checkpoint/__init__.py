"""Saving, resuming, exporting and verifying a run."""
