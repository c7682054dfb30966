"""Files that weights are read from, and tensors of theirs that have not been read yet."""
