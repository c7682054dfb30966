"""When ops and tasks begin and end, given bandwidths: all lanes on one clock. Pure.

Each lane serves in order: ops in the order of the trace, tasks in the order of the plan. So the order of events never
depends on how long one takes, and each begins at the latest of what it waits for:

    op       the op before has ended; so have the tasks that it waits for
    task     the op that triggers it has been reached, or is over; all tasks that it follows are; the task before it
             could begin; then the lane is free

A task of frames alone (``fresh``), or with nothing to do, takes no time and needs no lane. Times are whole nanoseconds,
rounded up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from pagemem.frames.page import TensorId
from scheduler.planning.machine import Machine
from scheduler.planning.task import Lane, Task
from scheduler.planning.trace import Op

NS: Final = 1_000_000_000


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


@dataclass(frozen=True, slots=True)
class Ended:
    """A run of a task: when it ends, and the lane that makes that as late as it is."""

    at_ns: int
    by: Lane
    tensor: TensorId


def _ceil_ns(seconds: float) -> int:
    return math.ceil(round(seconds * NS, 3))  # Without what binary fractions add to decimal ones.


@dataclass(slots=True)
class SimulatedLanes:
    """The lanes and the clock of the training thread, told of each task and op of a replay.

    Attributes:
        runs: ends of tasks, by the number that the replay gave each run of one.
        head_ns: when the last task of each lane could begin, but for the lane itself.
        op_ended_ns: of the last op. now_ns: when the training thread is where the replay is.
        waits: of the ops since the list was last replaced.
    """

    machine: Machine
    runs: dict[int, Ended] = field(default_factory=dict)
    free_ns: dict[Lane, int] = field(default_factory=lambda: dict.fromkeys(Lane, 0))
    head_ns: dict[Lane, int] = field(default_factory=lambda: dict.fromkeys(Lane, 0))
    busy_ns: dict[Lane, int] = field(default_factory=lambda: dict.fromkeys(Lane, 0))
    now_ns: int = 0
    waits: list[SimulatedWait] = field(default_factory=list)

    def start(
        self, run: int, task: Task, follows: Iterable[int], duration_s: float | None = None, *, needs_lane: bool = True
    ) -> None:
        """A task goes to its lane.

        Args:
            follows: runs of tasks. duration_s: its own; None: what its bytes take. needs_lane: whether it has anything
                to do.
        """
        lane, begin_ns, by = task.lane, self.now_ns, task.lane
        for other in follows:
            ended = self.runs.get(other)
            if ended is not None and ended.at_ns > begin_ns:
                begin_ns, by = ended.at_ns, ended.by
        if self.head_ns[lane] > begin_ns:
            begin_ns, by = self.head_ns[lane], lane
        self.head_ns[lane] = begin_ns
        takes_ns = _ceil_ns(self.machine.seconds(lane, task.n_bytes) if duration_s is None else duration_s)
        if needs_lane:
            if self.free_ns[lane] > begin_ns:
                begin_ns, by = self.free_ns[lane], lane
            self.free_ns[lane] = begin_ns = begin_ns + takes_ns
            self.busy_ns[lane] += takes_ns
        self.runs[run] = Ended(begin_ns, by, task.tensor)

    def perform(self, op: Op, position: int, waits_for: Iterable[int]) -> None:
        """An op of compute waits for runs of tasks and runs."""
        begin_ns, last = self.now_ns, None
        for run in waits_for:
            ended = self.runs.get(run)
            if ended is not None and ended.at_ns > begin_ns:
                begin_ns, last = ended.at_ns, ended
        if last is not None:
            seconds = (begin_ns - self.now_ns) / NS
            self.waits.append(SimulatedWait(position, op.name, seconds, last.tensor, last.by))
        takes_ns = _ceil_ns(op.duration_s)
        self.busy_ns[Lane.COMPUTE] += takes_ns
        self.now_ns = begin_ns + takes_ns

    def forget(self, known_over: Iterable[int]) -> None:
        """Nobody will ask for these runs any more."""
        for run in known_over:
            self.runs.pop(run, None)
