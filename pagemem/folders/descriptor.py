"""An open descriptor that is closed once, whatever interrupts."""

from __future__ import annotations

import os
from collections import deque


class Descriptor:
    """Owns an open descriptor. `close` may be interrupted anywhere, by a handler that raises, and called again."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._open: deque[int | None] = deque([fd, None])

    def fileno(self) -> int:
        """The descriptor's number, which is another file's after `close`."""
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return len(self._open) < 2

    def close(self) -> None:
        """Close it. Idempotent."""
        if self._open:
            # Taken out and closed by one call from C, within which no handler runs: neither lost nor closed twice.
            list(map(os.close, iter(self._open.popleft, None)))
