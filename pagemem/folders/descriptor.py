"""Open descriptors that are closed once, whatever interrupts."""

from __future__ import annotations

import os


def close_last(fds: list[int]) -> None:
    """Take the last descriptor out of a list and close it: in one call from C, within which no signal's handler runs,
    so it is neither lost nor closed twice.

    Raises:
        OSError: it could not be closed; the system has let go of it, too. IndexError: there is none.
    """
    next(map(os.close, iter(fds.pop, None)))


def close_fds(fds: list[int]) -> None:
    """Close descriptors, all of them, and empty the list.

    Raises:
        OSError: the first one that could not be closed; the system has let go of it, too.
    """
    failure: OSError | None = None
    while fds:
        try:
            close_last(fds)
        except OSError as error:
            failure = failure or error
    if failure is not None:
        raise failure


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
