"""State machines: a table of legal moves between the members of one enum, and the one method that checks them."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Generic, TypeVar

from pagemem.errors import TransitionError

State = TypeVar("State", bound=enum.Enum)


class StateMachine(Generic[State]):
    """The legal moves of one kind of object. Has no state: the object keeps its own, under its own lock.

    Write ``self.state = MOVES.move(self.state, there)``.

    Attributes:
        moves: by state, those that may follow; every state of the enum is a key.

    Args:
        what: leads the error message, before the object's name if it has one.
        moves: as the attribute; a state from which nothing follows may be left out.
    """

    def __init__(self, what: str, moves: Mapping[State, AbstractSet[State]]) -> None:
        self.what = what
        self.moves = {state: frozenset(moves.get(state, ())) for state in type(next(iter(moves)))}

    def move(self, here: State, there: State, name: str = "", history: Sequence[State] = ()) -> State:
        """Check one move; returns ``there``.

        Args:
            name: of the object, for the error.
            history: states before ``here``, for the error.

        Raises:
            TransitionError: the table has no such move.
        """
        if there not in self.moves[here]:
            past = f" (history: {' -> '.join(state.value for state in [*history, here])})" if history else ""
            who = f"{self.what} {name}".strip()
            raise TransitionError(f"{who}: {here.value} -> {there.value} is not a legal move{past}")
        return there
