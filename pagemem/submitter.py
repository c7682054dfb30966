"""One thread that hands transfers to the page files, so that the training thread does not.

Splitting a tensor into requests, queueing them and waking I/O threads takes some hundred microseconds of Python, a
hundred times a step. Done here it overlaps with the training thread's matrix products, which hold no interpreter lock.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Final

Done = Callable[[BaseException | None], None]
_STACK_BYTES: Final = 512 * 1024


class Submitter:
    """Calls what it is given, one after another, on its own thread ``page-submit``.

    `submit` may be called on any thread; `close` on any but its own. What a call raises goes to its ``done``.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Callable[[Done], None], Done] | None] = queue.SimpleQueue()
        # RLIMIT_DATA counts whole stacks: a small one is enough.
        before = threading.stack_size(_STACK_BYTES)
        try:
            self._thread = threading.Thread(target=self._serve, name="page-submit", daemon=True)
            self._thread.start()
        finally:
            threading.stack_size(before)

    def submit(self, call: Callable[[Done], None], done: Done) -> None:
        """Have ``call(done)`` made soon; in order of submission."""
        self._queue.put((call, done))

    def close(self) -> None:
        """Make what was submitted, then end the thread. Idempotent."""
        self._queue.put(None)
        self._thread.join()

    def _serve(self) -> None:
        while (entry := self._queue.get()) is not None:
            call, done = entry
            try:
                call(done)
            except BaseException as error:
                # The transfer was refused before it began: its owner hears of it as of one that failed.
                done(error)
            # A reference kept while waiting for the next entry would keep a buffer alive.
            del entry, call, done
