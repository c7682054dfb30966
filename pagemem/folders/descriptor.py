"""Open descriptors that are closed once, whatever interrupts."""

from __future__ import annotations

import os
from collections.abc import Callable


def close_last(fds: list[int], close: Callable[[int], None] = os.close) -> None:
    """Take the last descriptor out of a list and close it: in one call from C, within which no signal's handler runs,
    so it is neither lost nor closed twice.

    Raises:
        OSError: it could not be closed; the system has let go of it, too. IndexError: there is none.
    """
    next(map(close, iter(fds.pop, None)))


class Descriptor:
    """Owns an open descriptor. `close` may be interrupted anywhere, by a handler that raises, and called again."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._open = [fd]

    def fileno(self) -> int:
        """The descriptor's number, which is another file's after `close`."""
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return not self._open

    def close(self) -> None:
        """Close it. Idempotent."""
        if self._open:
            close_last(self._open)
