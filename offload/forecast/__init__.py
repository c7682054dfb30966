"""Estimates memory and step time without training: `offload plan`."""
