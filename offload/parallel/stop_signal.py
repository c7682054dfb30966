"""Why the ranks of a run stop, once they do: the first cause, which every rank's error names."""

from __future__ import annotations

import threading
from collections.abc import Callable


class StopSignal:
    """Set once. Any thread.

    Attributes:
        why: the cause, in words; None: nothing has stopped.
    """

    def __init__(self) -> None:
        self.why: str | None = None
        self._lock = threading.Lock()
        self._told: list[Callable[[], None]] = []

    def set(self, why: str) -> None:
        """Stop for this reason, unless there is another one already."""
        with self._lock:
            if self.why is not None:
                return
            self.why = why
            told = list(self._told)
        for tell in told:
            tell()

    def on_set(self, tell: Callable[[], None]) -> None:
        """Have ``tell`` called when it is set; now, if it is. It does not wait, and raises nothing."""
        with self._lock:
            self._told.append(tell)
            is_set = self.why is not None
        if is_set:
            tell()

    def forget(self, tell: Callable[[], None]) -> None:
        """``tell`` is not to be called any more."""
        with self._lock:
            self._told.remove(tell)
