"""What the tensors hold at one moment, made whole in the page files while training goes on.

Tensors whose current copy is whole are in the snapshot at once. The others *owe* it their bytes: they are stored in the
background, a few at a time, and whoever wants to change one before has it stored first and waits. A snapshot is complete
when nothing is owed. It is given up when a store fails; then nothing is named by it.

    OPEN --nothing owed--> COMPLETE --release--> RELEASED
    OPEN --a store failed, release--> RELEASED

Guarded by the mover's lock.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Final

from pagemem.copies import Copies, StoredCopy
from pagemem.errors import TransitionError
from pagemem.page import TensorId


class SnapshotState(enum.Enum):
    """See the diagram at the top of this module."""

    OPEN = "open"
    COMPLETE = "complete"
    RELEASED = "released"


_LEGAL: Final = {
    SnapshotState.OPEN: frozenset({SnapshotState.COMPLETE, SnapshotState.RELEASED}),
    SnapshotState.COMPLETE: frozenset({SnapshotState.RELEASED}),
    SnapshotState.RELEASED: frozenset(),
}


@dataclass(slots=True, eq=False)
class Snapshot:
    """One moment's copies. Made by `Mover.begin_snapshot`.

    Attributes:
        copies: of every tensor that had content, once it is stored.
        owing: tensors that are yet to be stored, those to be stored soonest first.
        error: why it was given up.
    """

    store: Copies
    owing: dict[TensorId, None] = field(default_factory=dict)
    copies: dict[TensorId, StoredCopy] = field(default_factory=dict)
    state: SnapshotState = SnapshotState.OPEN
    error: BaseException | None = None

    def add(self, tensor: TensorId, stored: StoredCopy) -> None:
        """The tensor's copy is whole."""
        self.store.hold(stored)
        self.copies[tensor] = stored
        self.owing.pop(tensor, None)

    def settle(self) -> None:
        """Become COMPLETE if nothing is owed any more."""
        if self.state is SnapshotState.OPEN and not self.owing:
            self._become(SnapshotState.COMPLETE)

    def release(self, error: BaseException | None = None) -> None:
        """Name nothing any more; frames that nobody else names are free."""
        self._become(SnapshotState.RELEASED)
        self.error = error
        self.owing.clear()
        for stored in self.copies.values():
            self.store.let_go(stored)

    def _become(self, state: SnapshotState) -> None:
        if state not in _LEGAL[self.state]:
            raise TransitionError(f"snapshot: {self.state.value} -> {state.value} is not a legal move")
        self.state = state
