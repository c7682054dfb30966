"""Waiting for background copies: one lock, who is told of changes, and the first error.

`CopyMonitor.changed` guards all bookkeeping of the mover that has it; no I/O is done while it is held. Every change of
state notifies it and calls the listeners, which run with the lock held, on the thread that made the change (an I/O
thread for the end of a copy), and must be cheap. The first error of a background copy is kept and raised by `check`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from pagemem.errors import OffloadError
from pagemem.process.wait_lock import WaitLock
from pagemem.telemetry.events import Event, EventKind, EventSink
from pagemem.telemetry.recorder import Recorder


class CopyMonitor:
    """Counts copies under way and lets threads wait for what they bring. Any thread; the lock is re-entrant.

    Args:
        sink: takes waits.
        name: of the lock.

    Attributes:
        changed: the lock, which is notified of every change.
        in_flight: copies under way; changed with the lock held.
        watcher: is told of waits that begin, while somebody profiles.
    """

    def __init__(self, sink: EventSink, name: str) -> None:
        self.changed = WaitLock(name)
        self.watcher: Recorder | None = None
        self.sink = sink
        self._failure: BaseException | None = None
        self._told = False
        self._listeners: list[Callable[[], None]] = []
        self.in_flight = 0

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` with the lock held after every change that may let a waiting move go on."""
        self._listeners.append(listener)

    def check(self) -> None:
        """Raise the first error of a background copy since the last call, once. Call on the training thread.

        Raises:
            StorageError: (or what the copy raised) every tensor is still whole where it was before that copy, and
                what moves it next tries again.
        """
        failure, self._failure = self._failure, None
        if failure is not None:
            self._told = True
            raise failure

    def note_failure(self, failure: BaseException) -> None:
        """Have `check` raise what ended a background task. Any thread."""
        with self.changed:
            self._failure = self._failure or failure
            self.changed.notify_all()

    @property
    def failed(self) -> bool:
        """Whether a background copy failed and nobody has been told yet."""
        return self._failure is not None

    def wait_until(
        self, ready: Callable[[], bool], why: str, n_bytes: int = 0, kind: EventKind = EventKind.WAIT
    ) -> None:
        """Block the calling thread until ``ready()``, and record the wait as an event of ``kind``.

        Raises:
            StorageError: (or what a background copy raised) instead of waiting for ever.
        """
        with self.changed:
            if ready():
                return
            started_s = time.perf_counter()
            if self.watcher is not None:
                self.watcher.waits(why)
            while not ready():
                self.check()
                self.changed.wait()
        self.sink.emit(Event(kind, why, n_bytes, started_s, time.perf_counter() - started_s))

    def settle(self) -> None:
        """Wait until no copy is under way, also after an error."""
        with self.changed:
            while self.in_flight:
                self.changed.wait()

    def close(self) -> None:
        """Wait until no copy is under way.

        Raises:
            StorageError: (or what a background copy raised) if `check` has never raised one before.
        """
        self.settle()
        if not self._told:
            self.check()

    def ended(self, error: BaseException | None) -> None:
        """A copy has ended. With the lock held, before `notify`."""
        self.in_flight -= 1
        self._failure = self._failure or error

    def forget_failure(self, error: BaseException) -> None:
        """The caller raises ``error`` itself: `check` does not. With the lock held."""
        if self._failure is error:
            self._failure = None

    def notify(self) -> None:
        """Something changed. With the lock held."""
        try:
            for listener in self._listeners:
                try:
                    listener()
                except OffloadError as error:
                    self._failure = self._failure or error
        finally:
            self.changed.notify_all()  # whatever a listener raised: who waits for this change hears of nothing else
