"""`python -m benchmarks.gpu_check`: see `benchmarks.gpu_check.command`."""

from benchmarks.gpu_check.command import main

if __name__ == "__main__":
    raise SystemExit(main())
