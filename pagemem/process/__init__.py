"""What concerns the whole process: signals, forks, garbage collection, closing."""
