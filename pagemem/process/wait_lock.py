"""A re-entrant lock that can be waited on, for threads that signal handlers interrupt, and counts of its use.

``with threading.Condition():`` calls methods written in Python, and a handler that raises as one of them begins or ends
leaves the lock held for good: every other thread then waits for ever. Here entering and leaving the block are single
calls of the interpreter's own lock.

While somebody measures, a lock has another class, whose methods are written in Python and count; otherwise counting
costs nothing.
"""

from __future__ import annotations

import _thread
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType


@dataclass(slots=True)
class LockUse:
    """How a lock was used while it was counted.

    Attributes:
        acquisitions: times that a thread took it which did not have it; the end of a wait is one.
        held_s, longest_hold_s: seconds that it was held, all together and at once; waits do not count.
    """

    acquisitions: int = 0
    held_s: float = 0.0
    longest_hold_s: float = 0.0


class WaitLock(_thread.RLock):  # type: ignore[misc]  # final for typeshed alone
    """`threading.Condition` over a lock of its own. Any thread.

    Args:
        name: what it guards.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self._condition = threading.Condition(self)
        self._use, self._depth, self._since_s = LockUse(), 0, 0.0

    def wait(self, timeout_s: float | None = None) -> None:
        """Give the lock up, which the caller holds, until somebody notifies or the time is up, and take it again."""
        self._condition.wait(timeout_s)

    def notify_all(self) -> None:
        """Wake all that wait, once the lock is free, which the caller holds."""
        self._condition.notify_all()


class _CountedLock(WaitLock):  # type: ignore[misc]  # as above
    """A lock that is being measured. Its fields are changed with it held.

    A thread may be inside one of these methods when the lock gets its own class back: none of them calls another of
    this class. A signal's handler that raises between taking the lock and counting that leaves it held: see the module.
    """

    def __enter__(self) -> bool:  # type: ignore[override]
        taken = WaitLock.__enter__(self)
        self._depth += 1
        if self._depth == 1:
            _begin_hold(self)
        return taken

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._depth:  # 0 where it was taken before it was counted
            self._depth -= 1
            if not self._depth:
                _end_hold(self)
        WaitLock.__exit__(self, kind, error, trace)

    def wait(self, timeout_s: float | None = None) -> None:
        """As `WaitLock.wait`."""
        depth, self._depth = self._depth, 0
        if depth:
            _end_hold(self)
        WaitLock.wait(self, timeout_s)
        self._depth = depth
        if depth:
            _begin_hold(self)


def _begin_hold(lock: WaitLock) -> None:
    lock._use.acquisitions += 1
    lock._since_s = time.perf_counter()


def _end_hold(lock: WaitLock) -> None:
    held_s = time.perf_counter() - lock._since_s
    lock._use.held_s += held_s
    lock._use.longest_hold_s = max(lock._use.longest_hold_s, held_s)


@contextmanager
def counted(*locks: WaitLock) -> Iterator[Mapping[str, LockUse]]:
    """Count the use of locks inside the block; yields what is found so far, by their names. Not nested."""
    for lock in locks:
        with lock:
            lock._use, lock._depth = LockUse(), 0
            lock.__class__ = _CountedLock
    try:
        yield {lock.name: lock._use for lock in locks}
    finally:
        for lock in locks:
            lock.__class__ = WaitLock
