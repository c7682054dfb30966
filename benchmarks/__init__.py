"""Runnable measurements of the engine: ``python -m benchmarks.NAME``. Not installed with the packages."""
