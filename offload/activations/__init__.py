"""Saved activations: offloaded, recomputed, or kept."""
