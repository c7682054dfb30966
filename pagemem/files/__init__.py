"""Page files: requests, transfers, I/O backends, checksums, striping and rate limits."""
