"""Puts the parts of an engine together."""
