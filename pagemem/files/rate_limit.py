"""A limit on bytes per second that any number of threads share. It models a slower disk; it knows nothing of files."""

from __future__ import annotations

import threading
import time

from pagemem import knobs


class TokenBucket:
    """Admits bytes at a steady rate, with a burst after idling.

    A caller takes its tokens at once, even into debt, and then sleeps until the debt it left is paid. Callers are so
    served in the order in which they arrive, and a request larger than the burst needs no special case. In any
    interval of t seconds at most ``burst + rate * t`` bytes are let through.

    Args:
        bytes_per_s: the rate, > 0.
    """

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self.burst_bytes = bytes_per_s * knobs.BURST_S
        self._lock = threading.Lock()
        self._balance_bytes = self.burst_bytes
        self._counted_to_s = time.monotonic()

    def take(self, n_bytes: int) -> float:
        """Wait until ``n_bytes`` may pass; any thread. Returns the seconds slept."""
        with self._lock:
            now_s = time.monotonic()
            earned = (now_s - self._counted_to_s) * self.bytes_per_s
            self._balance_bytes = min(self.burst_bytes, self._balance_bytes + earned) - n_bytes
            self._counted_to_s = now_s
            wait_s = max(0.0, -self._balance_bytes / self.bytes_per_s)
        if wait_s > 0:
            time.sleep(wait_s)
        return wait_s
