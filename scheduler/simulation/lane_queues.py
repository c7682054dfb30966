"""What lanes work on while a plan is simulated: runs of tasks, in queues, and what is told of them. Data."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from pagemem.frames.page import TensorId
from scheduler.planning.task import Lane, Task


@dataclass(frozen=True, slots=True)
class SimulatedWait:
    """An op that began later than the one before it ended.

    Attributes:
        op: its index in the cycle.
        tensor: what it waited for.
        lane: the lane that made it late: ``ssd_write`` also where a load waited for frames to be stored first.
    """

    op: int
    name: str
    seconds: float
    tensor: TensorId
    lane: Lane


@dataclass(slots=True)
class Run:
    """One execution of a task.

    Attributes:
        number: that the replay gave it. follows: runs that are over before it begins.
        asked_ns: when it was submitted. could_ns: when it could begin but for the lane. begun_ns, ended_ns: of its work
            there. -1 as long as they are not known.
        left_ns: of its work, at the rate that the lane has alone.
        by: the lane that makes it as late as it is.
        beside: it is none of the step's.
    """

    number: int
    task: Task
    follows: tuple[int, ...]
    needs_lane: bool
    left_ns: int
    asked_ns: int
    by: Lane
    could_ns: int = -1
    begun_ns: int = -1
    ended_ns: int = -1
    beside: bool = False


class SecondThread(Protocol):
    """A thread that updates beside the steps. It is told of what happens, at the time when it does, and answers by
    submitting tasks (`SimulatedLanes.submit`)."""

    def too_late(self, position: int) -> TensorId | None:
        """What an op of the cycle has to wait for: parameters that miss too many steps. None: it may begin."""

    def performed(self, position: int) -> None:
        """An op of the cycle is over."""

    def noted(self, run: Run) -> None:
        """One of its updates has begun, or has ended."""

    def state(self) -> tuple[object, ...]:
        """All that what it does next depends on, but for what is under way."""


@dataclass(frozen=True, slots=True)
class PerformedOp:
    """An op of the cycle, by its index there."""

    position: int
    begun_ns: int
    ended_ns: int


@dataclass(slots=True)
class Line:
    """Runs of one thread in one lane: those that cannot begin yet, and those that could but for the lane. ``head_ns``:
    when the last one of the others could."""

    waiting: deque[Run] = field(default_factory=deque)
    ready: deque[Run] = field(default_factory=deque)
    head_ns: int = 0


@dataclass(slots=True)
class LaneQueue:
    """One lane: what the step has for it, which comes first, what the updates beside it have, and the run it works
    on."""

    step: Line = field(default_factory=Line)
    beside: Line = field(default_factory=Line)
    active: Run | None = None

    @property
    def lines(self) -> tuple[Line, Line]:
        """The first one comes first."""
        return self.step, self.beside

    def runs(self) -> Iterator[Run]:
        """In order."""
        if self.active is not None:
            yield self.active
        for line in self.lines:
            yield from line.ready
            yield from line.waiting
