"""Which of the things that somebody watches are gone. Nothing written in Python runs when they go.

A finalizer runs wherever the last reference is dropped: with any lock held, in garbage collection, on any thread. What
a signal's handler raises in one is lost. So the end of a thing is noted by a call of the interpreter's own, and looked
at later.
"""

from __future__ import annotations

import weakref
from collections import deque
from typing import Generic, TypeVar

Note = TypeVar("Note")


class Gone(Generic[Note]):
    """Things that are watched, each with a note. They may go on any thread, at any moment; methods belong to one thread
    at a time."""

    def __init__(self) -> None:
        self._ended: deque[weakref.ref[object]] = deque()
        self._watches: dict[int, tuple[weakref.ref[object], Note]] = {}

    def watch(self, thing: object, note: Note) -> None:
        """Have ``note`` among those that `take` returns once ``thing`` is gone."""
        watch = weakref.ref(thing, self._ended.append)
        self._watches[id(watch)] = (watch, note)

    def take(self) -> list[Note]:
        """The notes of the things that have gone since the last call, in the order in which they went."""
        found: list[Note] = []
        while self._ended:
            found.append(self._watches.pop(id(self._ended.popleft()))[1])
        return found

    def __len__(self) -> int:
        """Things that are not gone, or of which nobody has taken the note."""
        return len(self._watches)
