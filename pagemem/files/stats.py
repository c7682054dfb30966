"""Counts of what page files did, kept by their I/O threads."""

from __future__ import annotations

import threading
import time


class IoMeter:
    """Requests of one direction since the page files were opened; any thread.

    Attributes:
        n_bytes: what they moved. A request that failed has moved no bytes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.n_bytes = 0
        self._in_flight = 0
        self._busy_since_s = 0.0
        self._busy_s = 0.0

    def begin(self) -> None:
        """A request goes to the system."""
        with self._lock:
            if self._in_flight == 0:
                self._busy_since_s = time.perf_counter()
            self._in_flight += 1

    def end(self, n_bytes: int) -> None:
        """The request is over and moved ``n_bytes`` (0: it failed)."""
        with self._lock:
            self._in_flight -= 1
            self.n_bytes += n_bytes
            if self._in_flight == 0:
                self._busy_s += time.perf_counter() - self._busy_since_s

    @property
    def busy_s(self) -> float:
        """Seconds in which at least one request was with the system (or held back by the limit); so
        ``n_bytes / busy_s`` is the bandwidth seen."""
        with self._lock:
            return self._busy_s + (time.perf_counter() - self._busy_since_s if self._in_flight else 0.0)
