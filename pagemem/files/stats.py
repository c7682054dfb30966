"""Counts of what page files did, kept by their I/O threads."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from pagemem.files.backend import Direction


@dataclass(frozen=True, slots=True)
class IoStats:
    """Totals since the page files were opened. A request that failed has moved no bytes.

    Attributes:
        read_busy_s: seconds in which at least one read was with the system (or held back by the limit); so
            ``bytes_read / read_busy_s`` is the bandwidth seen.
        write_busy_s: the same of writes.
    """

    bytes_read: int
    bytes_written: int
    read_busy_s: float
    write_busy_s: float


@dataclass(slots=True)
class _Totals:
    n_bytes: int = 0
    in_flight: int = 0
    busy_since_s: float = 0.0
    busy_s: float = 0.0


class IoMeter:
    """Gathers `IoStats`; any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._totals = {direction: _Totals() for direction in Direction}

    def begin(self, direction: Direction) -> None:
        """A request goes to the system."""
        with self._lock:
            totals = self._totals[direction]
            if totals.in_flight == 0:
                totals.busy_since_s = time.perf_counter()
            totals.in_flight += 1

    def end(self, direction: Direction, n_bytes: int) -> None:
        """The request is over and moved ``n_bytes`` (0: it failed)."""
        with self._lock:
            totals = self._totals[direction]
            totals.in_flight -= 1
            totals.n_bytes += n_bytes
            if totals.in_flight == 0:
                totals.busy_s += time.perf_counter() - totals.busy_since_s

    def stats(self) -> IoStats:
        """The totals now."""
        with self._lock:
            reads, writes = self._totals[Direction.READ], self._totals[Direction.WRITE]
            return IoStats(reads.n_bytes, writes.n_bytes, _busy_s(reads), _busy_s(writes))


def _busy_s(totals: _Totals) -> float:
    running_s = time.perf_counter() - totals.busy_since_s if totals.in_flight else 0.0
    return totals.busy_s + running_s
