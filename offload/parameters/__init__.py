"""Paged parameters, their gradients, and how they are bound to memory."""
