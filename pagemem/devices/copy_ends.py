"""The ends of copies that a device makes in one direction: a thread that waits for them in order, and tells of each.

Copies of one direction follow one another on the device, so they end in the order in which they were enqueued. Those of
the other direction are none of theirs, and have a thread of their own: neither waits behind the other.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from pagemem.devices.accelerator import DeviceEvent, has_reached


class CopyEnds:
    """Waits for copies.

    Args:
        name: of the thread. enter: called on it first. on_failure: called on it with what a ``finish`` raised; the
            thread goes on.
    """

    def __init__(self, name: str, enter: Callable[[], None], on_failure: Callable[[BaseException], None]) -> None:
        self._enter, self._on_failure = enter, on_failure
        self._under_way: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # A daemon, as I/O threads are: a program that dies without closing its engine must not hang on it.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin to wait.

        Raises:
            RuntimeError: the system starts no more threads.
        """
        self._thread.start()

    def add(self, finish: Callable[[], None], event: DeviceEvent) -> None:
        """Have a copy's end noted by ``finish``, whatever happens: now, where it is made already, else by the thread,
        for which ``finish`` waits for it (or for an error). Any thread."""
        made = False
        try:
            made = has_reached(event)
        finally:
            if not made:
                self._under_way.put(finish)
        if made:
            finish()

    def put(self, finish: Callable[[], None]) -> None:
        """As `add`, on the thread in any case: where the caller must not wait. Any thread."""
        self._under_way.put(finish)

    def end(self) -> None:
        """Have the thread end behind the copies that were added. Does not wait."""
        self._under_way.put(None)

    def join(self, patience_s: float | None) -> None:
        """Wait for that, so long or for ever (None)."""
        if self._thread.ident is not None:
            self._thread.join(patience_s)

    def _run(self) -> None:
        self._enter()
        while (finish := self._under_way.get()) is not None:
            try:
                finish()
            except BaseException as failure:  # whatever it is: a thread that ends silently leaves its waiters for ever
                self._on_failure(failure)
            # Not kept while waiting for the next one: it holds views of both arenas.
            del finish
