"""Bringing tensors into the memory of each tier, by a plan or on demand."""
