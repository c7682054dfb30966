"""Direct I/O without a page file: threads that do nothing but call preadv or pwritev, the floor of what a page file can
do."""

from __future__ import annotations

import os
import threading
import time
from itertools import count
from pathlib import Path

from benchmarks.disk.fio import Sample


class PlainLoop:
    """Sequential requests of one size over a file, each thread one after another, round and round through the buffers.

    Args:
        file: must be there; opened with O_DIRECT if ``direct``.
        memory: the buffers, one after another; read into or written from, and kept alive by the caller.
    """

    def __init__(self, file: Path, size_bytes: int, request_bytes: int, memory: memoryview, *, direct: bool) -> None:
        self._fd = os.open(file, os.O_RDWR | os.O_CLOEXEC | (os.O_DIRECT if direct else 0))
        self._n_requests = size_bytes // request_bytes
        self._request_bytes = request_bytes
        self._memory = memory

    def run(self, way: str, depth: int, seconds: float) -> Sample:
        """Measure ``"read"`` or ``"write"`` with so many threads.

        Raises:
            OSError: the system failed, or moved less than was asked for.
        """
        move = os.preadv if way == "read" else os.pwritev
        starts = range(0, len(self._memory), self._request_bytes)
        numbers, moved_bytes = count(), [0] * depth
        errors: list[OSError] = []
        end_s = time.perf_counter() + seconds

        def work(thread: int) -> None:
            while time.perf_counter() < end_s and not errors:
                number = next(numbers)
                start = starts[number % len(starts)]
                with self._memory[start : start + self._request_bytes] as buffer:
                    try:
                        n_bytes = move(self._fd, [buffer], number % self._n_requests * self._request_bytes)
                        if n_bytes != self._request_bytes:
                            raise OSError(f"{way} moved {n_bytes} bytes of {self._request_bytes}")
                    except OSError as error:
                        errors.append(error)
                        return
                moved_bytes[thread] += n_bytes

        threads = [threading.Thread(target=work, args=(i,), name=f"plain-io-{i}") for i in range(depth)]
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
        if errors:
            raise errors[0]
        return Sample(sum(moved_bytes), wall_s, cpu_s)

    def close(self) -> None:
        """Give back the descriptor."""
        os.close(self._fd)
