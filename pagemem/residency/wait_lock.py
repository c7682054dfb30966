"""A re-entrant lock that can be waited on, for threads that signal handlers interrupt.

``with threading.Condition():`` calls methods written in Python, and a handler that raises as one of them begins or ends
leaves the lock held for good: every other thread then waits for ever. Here entering and leaving the block are single
calls of the interpreter's own lock.
"""

from __future__ import annotations

import _thread
import threading


class WaitLock(_thread.RLock):  # type: ignore[misc]  # final for typeshed alone
    """`threading.Condition` over a lock of its own. Any thread."""

    def __init__(self) -> None:
        super().__init__()
        self._condition = threading.Condition(self)

    def wait(self, timeout_s: float | None = None) -> None:
        """Give the lock up, which the caller holds, until somebody notifies or the time is up, and take it again."""
        self._condition.wait(timeout_s)

    def notify_all(self) -> None:
        """Wake all that wait, once the lock is free, which the caller holds."""
        self._condition.notify_all()
