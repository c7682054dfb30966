"""Open descriptors that are closed once, whatever interrupts."""

from __future__ import annotations

import os


def close_fds(fds: list[int]) -> None:
    """Close descriptors, all of them, and empty the list. May be interrupted anywhere, by a handler that raises, and
    called again.

    Raises:
        OSError: the first one that could not be closed; the system has let go of it, too.
    """
    failure: OSError | None = None
    while fds:
        try:
            # Taken out and closed in one call from C, within which no signal's handler runs: neither lost nor closed
            # twice.
            next(map(os.close, iter(fds.pop, None)))
        except OSError as error:
            failure = failure or error
    if failure is not None:
        raise failure
