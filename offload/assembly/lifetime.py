"""How long an engine lives, and what may be asked of it when: it runs from its constructor on, until it is closed for
good, or is another process's in a forked child."""

from __future__ import annotations

from collections.abc import Callable

from pagemem.process.closing import close_all
from pagemem.process.forks import disowned


class Lifetime:
    """Whether one engine is running, and what is undone at its end. Training thread only.

    Args:
        last: called after everything has been undone.

    Attributes:
        undo: what takes a change to the model, or a thread, back; called in order.
    """

    def __init__(self, last: Callable[[], None]) -> None:
        self.closed = self.disowned = False
        self.undo: list[Callable[[], None]] = []
        self._last = last

    def check_running(self) -> None:
        """Raise RuntimeError unless the engine is running."""
        self.check_owned()
        if self.closed:
            raise RuntimeError("this engine is closed")

    def check_owned(self) -> None:
        """Raise RuntimeError in a forked child."""
        if self.disowned:
            raise disowned("this engine")

    def end(self) -> None:
        """The engine is being closed."""
        self.closed = True

    def release(self) -> None:
        """Undo everything, also where some of it fails."""
        undo, self.undo = self.undo, []
        close_all(*undo, self._last)

    def disown(self) -> None:
        """In a forked child: the engine is the parent's."""
        self.disowned = True
