"""How long an engine lives, and what may be asked of it when.

RUNNING --(close)--> CLOSED --(fork)--> DISOWNED
RUNNING ------------(fork)------------> DISOWNED
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Final

from pagemem.process.closing import close_all
from pagemem.process.forks import disowned
from pagemem.state_machine import StateMachine


class EngineState(enum.Enum):
    """RUNNING from the constructor on; CLOSED for good, or DISOWNED in a forked child."""

    RUNNING = "running"
    CLOSED = "closed"
    DISOWNED = "disowned"


_MOVES: Final = StateMachine(
    "engine",
    {
        EngineState.RUNNING: {EngineState.CLOSED, EngineState.DISOWNED},
        EngineState.CLOSED: {EngineState.DISOWNED},
        EngineState.DISOWNED: {EngineState.DISOWNED},
    },
)


class Lifetime:
    """The state of one engine, and what is undone at its end. Training thread only.

    Args:
        last: called after everything has been undone.

    Attributes:
        undo: what takes a change to the model, or a thread, back; called in order.
    """

    def __init__(self, last: Callable[[], None]) -> None:
        self.state = EngineState.RUNNING
        self.undo: list[Callable[[], None]] = []
        self._last = last

    def check_running(self) -> None:
        """Raise RuntimeError unless the engine is running."""
        self.check_owned()
        if self.state is not EngineState.RUNNING:
            raise RuntimeError("this engine is closed")

    def check_owned(self) -> None:
        """Raise RuntimeError in a forked child."""
        if self.state is EngineState.DISOWNED:
            raise disowned("this engine")

    def end(self) -> None:
        """The engine is being closed."""
        if self.state is EngineState.RUNNING:  # else an earlier call was left by what a signal's handler raised
            self.state = _MOVES.move(self.state, EngineState.CLOSED)

    def release(self) -> None:
        """Undo everything, also where some of it fails."""
        undo, self.undo = self.undo, []
        close_all(*undo, self._last)

    def disown(self) -> None:
        """In a forked child: the engine is the parent's."""
        self.state = _MOVES.move(self.state, EngineState.DISOWNED)
