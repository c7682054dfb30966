"""Keeps what an engine does while somebody profiles: bytes held, ops, moves, updates, waits and their causes.

Everything is only noted down while the engine works, in lists that any thread may append to; what it means is worked
out afterwards. Memory grows with what happens, by about 200 bytes for each note.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pagemem.telemetry.events import Event, EventKind
from pagemem.telemetry.timeline import HeldChange, Timeline
from pagemem.tier import Tag, Tier


@dataclass(frozen=True, slots=True)
class WaitCause:
    """What a wait waited for.

    Attributes:
        lane: "read", "write", "h2d", "d2h" or "update": who had yet to do something; "none" where that is not known.
        reason: what, in words that are the same for equal reasons.
        blocker: the tensor that was in the way, or "".
    """

    lane: str
    reason: str
    blocker: str = ""


UNKNOWN_CAUSE = WaitCause("none", "not known")
#: An event of a wait that did not begin in `Recorder.waits`: lock-free mode waits for the updater itself.
_UPDATER = WaitCause("update", "the updater had yet to get that far")
_WAITS = frozenset({EventKind.WAIT, EventKind.UPDATE_WAIT})


@dataclass(frozen=True, slots=True)
class WaitSpan:
    """A wait, of the training thread (or the one that has its place in a backward pass) or another."""

    name: str
    n_bytes: int
    start_s: float
    end_s: float
    cause: WaitCause
    training: bool


@dataclass(frozen=True, slots=True)
class OpSpan:
    """An op of the training thread, from its tensors being at hand to the next op's beginning, waits inside
    included."""

    phase: str
    name: str
    tensor: str
    n_bytes: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Recording:
    """All that was recorded; times are those of `time.perf_counter`.

    Attributes:
        events: everything but waits: moves, updates, deviations.
        step_ends_s: when optimizer steps were made.
        spent_s: seconds inside the recorder, on all threads; ``training_spent_s`` of them on the training thread.
        n_calls: calls of the recorder.
    """

    begin_s: float
    end_s: float
    timeline: Timeline
    ops: Sequence[OpSpan]
    events: Sequence[Event]
    waits: Sequence[WaitSpan]
    step_ends_s: Sequence[float]
    spent_s: float
    training_spent_s: float
    n_calls: int

    def of(self, kind: EventKind) -> list[Event]:
        """All events of one kind."""
        return [event for event in self.events if event.kind is kind]


class Recorder:
    """Watches an engine while it is profiled, and keeps everything. Made and finished on the training thread; told of
    things on any, sometimes with the caller's lock held.

    Args:
        explain: what a wait for the tensor of a name has to wait for; called with the mover's lock held.
    """

    def __init__(self, explain: Callable[[str], WaitCause]) -> None:
        self._explain = explain
        # The training thread, and a thread of autograd that performs ops in its place: a device's backward pass has
        # one.
        self._training = {threading.get_ident()}
        self._changes: list[HeldChange] = []
        self._ops: list[OpSpan] = []
        self._events: list[Event] = []
        self._waits: list[WaitSpan] = []
        self._step_ends_s: list[float] = []
        self._op: tuple[str, str, str, int, float] | None = None
        # Of each thread its own: only that thread writes there.
        self._causes: dict[int, tuple[str, WaitCause]] = {}
        self._spent: dict[int, tuple[float, int]] = {}
        self._began_s = time.perf_counter()

    # ---- what the engine calls ---------------------------------------------------------------------------------

    def held(self, tier: Tier, tag: Tag, more_bytes: int) -> None:
        """Note that so many bytes more (or less) are held; called under the lock that guards them, in the order of the
        changes."""
        now_s = time.perf_counter()
        self._changes.append((now_s, tier, tag, more_bytes))
        self._count(now_s)

    def emit(self, event: Event) -> None:
        """Note an event; a wait with its cause."""
        now_s, thread = time.perf_counter(), threading.get_ident()
        if event.kind in _WAITS:
            begun, cause = self._causes.pop(thread, ("", _UPDATER))
            if begun != event.name:  # Left by a wait that failed.
                cause = _UPDATER
            end_s = event.start_s + event.duration_s
            self._waits.append(
                WaitSpan(event.name, event.n_bytes, event.start_s, end_s, cause, thread in self._training)
            )
        else:
            self._events.append(event)
        self._count(now_s)

    def waits(self, why: str) -> None:
        """Note what the calling thread is about to wait for, with the mover's lock held. The wait's event follows."""
        now_s = time.perf_counter()
        self._causes[threading.get_ident()] = why, self._explain(why)
        self._count(now_s)

    def begins(self, phase: str, name: str, tensor: str, n_bytes: int) -> None:
        """Note that an op has its tensors at hand, of which ``tensor`` is the first; it lasts until `ends`."""
        now_s = time.perf_counter()
        self._training.add(threading.get_ident())
        self._op = (phase, name, tensor, n_bytes, now_s)
        self._count(now_s)

    def ends(self) -> None:
        """Note that what the training thread was doing is over, if it was doing anything."""
        now_s = time.perf_counter()
        self._training.add(threading.get_ident())
        self._end_op(now_s)
        self._count(now_s)

    def step_ends(self) -> None:
        """Note that the optimizer step is made."""
        now_s = time.perf_counter()
        self._end_op(now_s)
        self._step_ends_s.append(now_s)
        self._count(now_s)

    def _end_op(self, now_s: float) -> None:
        if self._op is not None:
            self._ops.append(OpSpan(*self._op, now_s))
            self._op = None

    def _count(self, since_s: float) -> None:
        thread = threading.get_ident()
        spent_s, n_calls = self._spent.get(thread, (0.0, 0))
        self._spent[thread] = (spent_s + time.perf_counter() - since_s, n_calls + 1)

    # ---- what comes of it --------------------------------------------------------------------------------------

    def finish(self, held: Mapping[tuple[Tier, Tag], int]) -> Recording:
        """Everything recorded, once nobody is told to call any more.

        Args:
            held: bytes held when recording began.
        """
        end_s = time.perf_counter()
        self._end_op(end_s)
        # A thread may be inside a last call: what it adds after this moment is not part of the recording.
        changes = [change for change in list(self._changes) if change[0] <= end_s]
        spent = dict(self._spent)
        return Recording(
            self._began_s,
            end_s,
            Timeline(self._began_s, end_s, held, changes),
            tuple(self._ops),
            tuple(self._events),
            tuple(self._waits),
            tuple(self._step_ends_s),
            sum(spent_s for spent_s, _ in spent.values()),
            sum(spent.get(thread, (0.0, 0))[0] for thread in self._training),
            sum(n_calls for _, n_calls in spent.values()),
        )
