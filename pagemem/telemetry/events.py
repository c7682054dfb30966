"""Records of what the engine does, and the sinks that take them.

A sink is called on whichever thread did the thing, must be cheap, and must not call back into the engine. A
`pagemem.telemetry.recorder.Recorder` is told more, but only while there is one: otherwise that costs one look at an
attribute.
"""

from __future__ import annotations

import enum
import threading
from dataclasses import dataclass
from typing import Protocol


class EventKind(enum.Enum):
    """What happened. READ and WRITE move pages between host and page file, UPLOAD from host to device, COMM between
    ranks; WAIT blocks the training thread."""

    # Members are single: enum's own hash, of the name, is a Python call.
    __hash__ = object.__hash__

    READ = "read"
    WRITE = "write"
    UPLOAD = "upload"
    COMM = "comm"
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


class NullSink:
    """Forgets everything."""

    def emit(self, event: Event) -> None:
        """Forget ``event``."""


class Counters:
    """Adds up seconds by kind, and passes each event on.

    Attributes:
        onward: who takes them; may be exchanged at any time.
        seconds: of all events of a kind so far; concurrent events add up.
    """

    def __init__(self) -> None:
        self.onward: EventSink = NullSink()
        self.seconds = dict.fromkeys(EventKind, 0.0)
        self._lock = threading.Lock()

    def emit(self, event: Event) -> None:
        """Add ``event`` up and pass it on."""
        with self._lock:
            self.seconds[event.kind] += event.duration_s
        self.onward.emit(event)
