"""The first checks on a GPU (`python -m benchmarks.gpu_check`)."""
