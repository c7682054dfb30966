"""A limit on bytes per second that any number of threads share. It models a slower disk; it knows nothing of files."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class TokenBucket:
    """Admits bytes at a steady rate, with a burst after idling.

    A caller takes its tokens at once, even into debt, and then sleeps until the debt it left is paid. Callers are so
    served in the order in which they arrive, and a request larger than the burst needs no special case. In any
    interval of t seconds at most ``burst + rate * t`` bytes are let through.

    Args:
        bytes_per_s: the rate, > 0.
        burst_s: how many seconds' worth of tokens idling can gather.
        clock: monotonic seconds.
        sleep: blocks the calling thread for a number of seconds.
    """

    def __init__(
        self,
        bytes_per_s: float,
        *,
        burst_s: float = 0.05,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not bytes_per_s > 0:
            raise ValueError(f"a rate must be positive, not {bytes_per_s} bytes/s; use None for no limit")
        if burst_s < 0:
            raise ValueError(f"a burst cannot be negative: {burst_s} s")
        self.bytes_per_s = bytes_per_s
        self.burst_bytes = bytes_per_s * burst_s
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._balance_bytes = self.burst_bytes
        self._counted_to_s = clock()
        self._taken_bytes = 0

    @property
    def taken_bytes(self) -> int:
        """Bytes asked for since the start."""
        with self._lock:
            return self._taken_bytes

    def take(self, n_bytes: int) -> float:
        """Wait until ``n_bytes`` may pass; any thread. Returns the seconds slept."""
        with self._lock:
            now_s = self._clock()
            earned = (now_s - self._counted_to_s) * self.bytes_per_s
            self._balance_bytes = min(self.burst_bytes, self._balance_bytes + earned) - n_bytes
            self._counted_to_s = now_s
            self._taken_bytes += n_bytes
            wait_s = max(0.0, -self._balance_bytes / self.bytes_per_s)
        if wait_s > 0:
            self._sleep(wait_s)
        return wait_s
