"""A sink that keeps every event."""

from __future__ import annotations

from pagemem.telemetry.events import Event, EventKind


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
