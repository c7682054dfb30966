"""Records of what the engine does, and the sinks that take them.

A sink is called on whichever thread did the thing, must be cheap, and must not call back into the engine. `NullSink`
costs one call; `Counters` adds up what a run report needs; `EventLog` keeps everything for tests. A `Watcher` is told
more, but only while there is one: otherwise that costs one look at an attribute.
"""

from __future__ import annotations

import enum
import threading
from collections import Counter
from dataclasses import dataclass
from typing import Protocol

from pagemem.tier import Tag, Tier


class EventKind(enum.Enum):
    """What happened. READ and WRITE move pages between host and page file, UPLOAD from host to device; WAIT blocks the
    training thread."""

    # Members are single: enum's own hash, of the name, is a Python call.
    __hash__ = object.__hash__

    READ = "read"
    WRITE = "write"
    UPLOAD = "upload"
    WAIT = "wait"
    UPDATE = "update"
    UPDATE_WAIT = "update wait"
    DEVIATION = "deviation"


@dataclass(frozen=True, slots=True)
class Event:
    """One record: ``name`` is the paged tensor or unit, times are `time.perf_counter` seconds."""

    kind: EventKind
    name: str
    n_bytes: int
    start_s: float
    duration_s: float


class EventSink(Protocol):
    """Takes events from any thread."""

    def emit(self, event: Event) -> None:
        """Take one record."""


class Watcher(EventSink, Protocol):
    """Watches an engine while it is profiled. Any thread; some calls come with the caller's lock held."""

    def held(self, tier: Tier, tag: Tag, more_bytes: int) -> None:
        """So many bytes more (or less) are held; called under the lock that guards them, in the order of the
        changes."""

    def waits(self, why: str) -> None:
        """The calling thread is about to wait; called with the mover's lock held. The wait's own event follows it."""

    def begins(self, phase: str, name: str, tensor: str, n_bytes: int) -> None:
        """An op has its tensors at hand, of which ``tensor`` is the first; it lasts until `ends`."""

    def ends(self) -> None:
        """What the training thread was doing is over, if it was doing anything."""

    def step_ends(self) -> None:
        """The optimizer step is made."""


class NullSink:
    """Forgets everything."""

    def emit(self, event: Event) -> None:
        """Forget ``event``."""


class EventLog:
    """Keeps every event, in the order of their ends."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        """Keep ``event``; list.append is atomic."""
        self.events.append(event)

    def of(self, kind: EventKind) -> list[Event]:
        """All events of one kind."""
        return [event for event in self.events if event.kind is kind]


class Counters:
    """Adds up count, bytes and seconds by kind, and passes each event on.

    Attributes:
        onward: who takes them; may be exchanged at any time.
    """

    def __init__(self, onward: EventSink | None = None) -> None:
        self.onward: EventSink = onward or NullSink()
        self._lock = threading.Lock()
        self._count: Counter[EventKind] = Counter()
        self._bytes: Counter[EventKind] = Counter()
        self._seconds: dict[EventKind, float] = dict.fromkeys(EventKind, 0.0)

    def emit(self, event: Event) -> None:
        """Add ``event`` up and pass it on."""
        with self._lock:
            self._count[event.kind] += 1
            self._bytes[event.kind] += event.n_bytes
            self._seconds[event.kind] += event.duration_s
        self.onward.emit(event)

    def count(self, kind: EventKind) -> int:
        """Events of ``kind`` so far."""
        return self._count[kind]

    def n_bytes(self, kind: EventKind) -> int:
        """Bytes of all events of ``kind`` so far."""
        return self._bytes[kind]

    def seconds(self, kind: EventKind) -> float:
        """Seconds of all events of ``kind`` so far; concurrent events add up."""
        return self._seconds[kind]
