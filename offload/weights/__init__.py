"""Weights into models: matching names, `load_weights` and `from_pretrained`."""
