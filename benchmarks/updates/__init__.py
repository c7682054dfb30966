"""Benchmarks of who makes exact updates, and when."""
