"""Files of other programs that are only read, and tensors whose content lies in them."""
