"""Lock-free updates on a slow disk: speed and quality (`python -m benchmarks.lockfree`)."""
