"""Saved activations: in pages, computed again, or left alone."""
