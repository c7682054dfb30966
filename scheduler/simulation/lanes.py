"""When ops and tasks begin and end, given bandwidths: all lanes on one clock. Pure.

Each lane serves in order: ops in the order of the trace, tasks in the order of the plan. Each begins at the latest of
what it waits for:

    op       the op before has ended; so have the tasks that it waits for
    task     the op that triggers it has been reached, or is over; all tasks that it follows are; the task before it
             could begin; then the lane is free

A task of frames alone (``fresh``), or with nothing to do, takes no time and needs no lane. Lanes that share a rate
(`SharedRate`) divide it equally while several are busy, and what one cannot use is the others'. Times are whole
nanoseconds, rounded up.

What will be submitted while a task is under way may slow it down, so a task's end is known only once the clock is
there: the training thread's ops and submissions drive it.

Where another thread updates beside the steps (`SecondThread`), it acts when one of its updates begins or ends. Its
moves give way to those of the step where both could begin, and the two threads slow each other down
(`Machine.together`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

from pagemem.frames.page import TensorId
from pagemem.tier import Tier
from scheduler.planning.machine import Machine
from scheduler.planning.task import Lane, Task, TaskKind
from scheduler.planning.trace import Op
from scheduler.simulation.lane_queues import LaneQueue, Line, PerformedOp, Run, SecondThread, SimulatedWait

NS: Final = 1_000_000_000


#: What compute does, as a piece of work of its lane.
_COMPUTE: Final = Task(TaskKind.UPDATE, TensorId(-1), Tier.HOST, Lane.COMPUTE, 0, 0)


def ceil_ns(seconds: float) -> int:
    """Whole nanoseconds, without what binary fractions add to decimal ones."""
    return math.ceil(round(seconds * NS, 3))


class SimulatedLanes:
    """The lanes and the clock of the training thread, told of each task and op of a replay.

    Attributes:
        now_ns: when the training thread is where the replay is.
        waits: of the ops since the list was last replaced.
        busy_ns: of each lane, up to where its tasks were followed.
        beside: a thread that updates beside the steps.
        performed, started: ops, and runs of tasks as they are submitted, where somebody has put a list there.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.now_ns = 0
        self.waits: list[SimulatedWait] = []
        self.busy_ns: dict[Lane, int] = dict.fromkeys(Lane, 0)
        self.performed: list[PerformedOp] | None = None
        self.started: list[Run] | None = None
        self.beside: SecondThread | None = None
        self._noted: list[Run] = []
        self._clock_ns = 0
        self._lanes = {lane: LaneQueue() for lane in Lane}
        self._runs: dict[int, Run] = {}

    # ---- what the replay tells ---------------------------------------------------------------------------------

    def start(
        self, run: int, task: Task, follows: Iterable[int], duration_s: float | None = None, *, needs_lane: bool = True
    ) -> None:
        """A task goes to its lane.

        Args:
            follows: runs of tasks. duration_s: its own; None: what its bytes take. needs_lane: whether it has anything
                to do.
        """
        self._advance(self.now_ns)
        takes_s = self.machine.seconds(task.lane, task.n_bytes) if duration_s is None else duration_s
        known = tuple(sorted(other for other in follows if other in self._runs))
        made = Run(run, task, known, needs_lane, ceil_ns(takes_s) if needs_lane else 0, self.now_ns, task.lane)
        self._runs[run] = made
        if self.started is not None:
            self.started.append(made)
        self._lanes[task.lane].step.waiting.append(made)
        self._begin_what_can()

    def submit(self, run: int, task: Task, follows: Iterable[int], duration_s: float | None = None) -> None:
        """A task of the updates beside the steps goes to its lane, at the time that `SecondThread` was told of. For the
        arguments see `start`; its numbers are none of the step's."""
        takes_s = self.machine.seconds(task.lane, task.n_bytes) if duration_s is None else duration_s
        known = tuple(sorted(other for other in follows if other in self._runs))
        made = Run(run, task, known, True, ceil_ns(takes_s), self._clock_ns, task.lane, beside=True)
        self._runs[run] = made
        if self.started is not None:
            self.started.append(made)
        self._lanes[task.lane].beside.waiting.append(made)

    def perform(self, op: Op, position: int, waits_for: Iterable[int]) -> None:
        """An op of compute waits for what is beside the steps, and for runs of tasks, and runs."""
        self._advance(self.now_ns)
        if self.beside is not None:
            self._wait_beside(self.beside, op, position)
        wanted = [self._runs[run] for run in waits_for if run in self._runs]
        while any(run.ended_ns < 0 for run in wanted):
            if not self._next_event():
                raise AssertionError(f"{op.name} waits for what nothing brings")
        begin_ns, last = self.now_ns, None
        for run in wanted:
            if run.ended_ns > begin_ns:
                begin_ns, last = run.ended_ns, run
        if last is not None:
            seconds = (begin_ns - self.now_ns) / NS
            self.waits.append(SimulatedWait(position, op.name, seconds, last.task.tensor, last.by))
        self.now_ns = begin_ns
        takes_ns = ceil_ns(op.duration_s)
        if self.beside is None:
            self.busy_ns[Lane.COMPUTE] += takes_ns
            self.now_ns += takes_ns
        else:
            self._compute(takes_ns)
            self.beside.performed(position)
            self._begin_what_can()
        if self.performed is not None:
            self.performed.append(PerformedOp(position, begin_ns, self.now_ns))

    def _wait_beside(self, beside: SecondThread, op: Op, position: int) -> None:
        """Wait until no parameters of an op miss too many steps."""
        waited_for: TensorId | None = None
        while (late := beside.too_late(position)) is not None:
            waited_for = late
            self._begin_what_can()
            if not self._next_event():
                raise AssertionError(f"{op.name} waits for an update that nobody makes")
        if waited_for is not None and self._clock_ns > self.now_ns:
            seconds = (self._clock_ns - self.now_ns) / NS
            self.waits.append(SimulatedWait(position, op.name, seconds, waited_for, Lane.UPDATE))
            self.now_ns = self._clock_ns

    def _compute(self, takes_ns: int) -> None:
        """Compute for so long, or longer, as long as updates work on the same cores."""
        self._advance(self.now_ns)
        work = Run(-1, _COMPUTE, (), True, takes_ns, self.now_ns, Lane.COMPUTE)
        if takes_ns:
            self._lanes[Lane.COMPUTE].active = work
        while self._lanes[Lane.COMPUTE].active is work:
            self._next_event()
        self.now_ns = max(self.now_ns, self._clock_ns)

    def pending(self) -> tuple[object, ...]:
        """All that is under way when the training thread is where the replay is: two moments with the same are
        followed by the same. What is over by then is forgotten."""
        self._advance(self.now_ns)
        self._runs = {number: run for number, run in self._runs.items() if run.ended_ns < 0}
        places = {number: place for place, number in enumerate(sorted(self._runs))}
        return tuple(
            (
                run.task.tensor, run.task.lane, run.left_ns, run.needs_lane, run.by, run.begun_ns >= 0,
                tuple(places[other] for other in run.follows if other in places),
            )
            for lane in self._lanes.values()
            for run in lane.runs()
        )  # fmt: skip

    def finish(self) -> int:
        """Follow the tasks that are under way to their ends; returns when all and the last op are over."""
        self._advance(self.now_ns)
        while self._next_event():
            pass
        return max(self.now_ns, self._clock_ns)

    # ---- the clock ---------------------------------------------------------------------------------------------

    def _advance(self, to_ns: int) -> None:
        """Let tasks go on until a time."""
        while (end_ns := self._next_end_ns()) is not None and end_ns <= to_ns:
            self._work_until(end_ns)
        if to_ns > self._clock_ns:
            self._work_until(to_ns)

    def _next_event(self) -> bool:
        """Let tasks go on until one of them is over; False: none is at work."""
        end_ns = self._next_end_ns()
        if end_ns is not None:
            self._work_until(end_ns)
        return end_ns is not None

    def _next_end_ns(self) -> int | None:
        """When the first of the runs that are worked on is over, if nothing else begins before."""
        slowed = self._slowed()
        ends = [
            self._clock_ns + (math.ceil(run.left_ns / slowed[lane]) if lane in slowed else run.left_ns)
            for lane, queue in self._lanes.items()
            if (run := queue.active) is not None
        ]
        return min(ends, default=None)

    def _work_until(self, to_ns: int) -> None:
        """Move the clock to a time at or before the next end, and begin what that lets begin."""
        slowed, spent_ns = self._slowed(), to_ns - self._clock_ns
        self._clock_ns = to_ns
        for lane, queue in self._lanes.items():
            run = queue.active
            if run is None:
                continue
            self.busy_ns[lane] += spent_ns
            run.left_ns -= math.ceil(spent_ns * slowed[lane]) if lane in slowed else spent_ns
            if run.left_ns <= 0:
                queue.active = None
                self._end(run)
        self._begin_what_can()

    def _slowed(self) -> dict[Lane, float]:
        if not self.machine.slows:
            return {}
        return self.machine.slowed(lane for lane, queue in self._lanes.items() if queue.active is not None)

    def _begin_what_can(self) -> None:
        """At the clock's time; ends of tasks that take no time let others begin, and so does what is beside the
        steps."""
        again = True
        while again:
            again = False
            for queue in self._lanes.values():
                again |= self._begin_in(queue)
            noted, self._noted = self._noted, []
            for run in noted:
                assert self.beside is not None
                self.beside.noted(run)
                again = True

    def _begin_in(self, queue: LaneQueue) -> bool:
        """Begin what can in one lane; returns whether something ended by that."""
        ended = False
        for line in queue.lines:
            while line.waiting and all(self._is_over(other) for other in line.waiting[0].follows):
                run = line.waiting.popleft()
                self._could_begin(run, line)
                if run.needs_lane:
                    line.ready.append(run)
                else:
                    self._end(run)
                    ended = True
        while queue.active is None and (line := queue.step if queue.step.ready else queue.beside).ready:
            run = line.ready.popleft()
            if self._clock_ns > run.could_ns:
                run.by = run.task.lane
            run.begun_ns = self._clock_ns
            self._note(run)
            if run.left_ns:
                queue.active = run
            else:
                self._end(run)
                ended = True
        return ended

    def _note(self, run: Run) -> None:
        if run.beside and run.task.kind is TaskKind.UPDATE:
            self._noted.append(run)

    def _could_begin(self, run: Run, line: Line) -> None:
        """A run could begin now, but for the lane: note what made it as late as that."""
        latest_ns = run.asked_ns
        for other in run.follows:
            followed = self._runs.get(other)
            if followed is not None and followed.ended_ns > latest_ns:
                latest_ns, run.by = followed.ended_ns, followed.by
        if line.head_ns > latest_ns:
            run.by = run.task.lane
        line.head_ns = run.could_ns = self._clock_ns

    def _is_over(self, number: int) -> bool:
        run = self._runs.get(number)
        return run is None or run.ended_ns >= 0

    def _end(self, run: Run) -> None:
        run.ended_ns = self._clock_ns
        if run.begun_ns < 0:
            run.begun_ns = self._clock_ns
        self._note(run)
