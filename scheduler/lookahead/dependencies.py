"""Which tasks each task of a plan follows. Pure.

Two cycles are passed over, and of every tensor is noted what last wrote and reads it. A task follows what made its
source, and everything that has to do with the tenants of its frames, unless an op that is over when the task is
triggered has waited for it already.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from pagemem.frames.page import FrameId, TensorId
from pagemem.tier import Tier
from scheduler.lookahead.tensor_facts import room_of
from scheduler.planning.task import NO_FRAME, Lane, Task, TaskKind
from scheduler.planning.trace import CHANGES, AccessMode, Conditional, Op
from scheduler.planning.work import Work

#: The first may begin otherwise than all others.
CYCLES: Final = 2


#: A task in a cycle: its place, and so many times the number of tasks.
_Run = int


@dataclass(slots=True)
class _Of:
    """What has to do with one tensor: what made its content, what reads it, its last copy below, its last copy out of
    paged memory, the last op that uses it."""

    made: set[_Run] = field(default_factory=set)
    reads: set[_Run] = field(default_factory=set)
    stored: set[_Run] = field(default_factory=set)
    out: set[_Run] = field(default_factory=set)
    used_until: int = -1


class Dependencies:
    """Finds what tasks follow. Ops and runs of tasks count on over all cycles.

    Args:
        tasks: of a cycle of ``n_ops`` ops, in order; the last ``n_wrapped`` are for the cycle after.
        initial: what is where when a cycle begins, after the one before has ended (``closed``) or been undone.
    """

    def __init__(
        self,
        work: Work,
        tasks: Sequence[Task],
        n_ops: int,
        n_wrapped: int,
        initial: Mapping[TensorId, FrameId],
        *,
        closed: bool,
    ) -> None:
        self._work = work
        self.tasks = list(tasks)
        self._n_ops = n_ops
        self._n_inside = len(tasks) - n_wrapped
        self._after: dict[_Run, set[_Run]] = {}
        self._over: dict[_Run, int] = {}  # the op from whose beginning on a task is known to be over
        self._of: dict[TensorId, _Of] = defaultdict(_Of)
        self._copies: dict[TensorId, list[TensorId]] = defaultdict(list)
        for copy, source in work.sources.items():
            self._copies[source.tensor].append(copy)
        self._frames: dict[Tier, list[TensorId | None]] = {
            tier: [None] * n_frames for tier, n_frames in work.machine.n_frames.items()
        }
        self._where: dict[TensorId, FrameId] = {}
        self._busy: dict[tuple[Tier, int], set[_Run]] = {}  # what works on frames that were left
        self._initial = initial
        self._closed = closed
        self._begin()

    def _begin(self) -> None:
        """Nothing is under way, and everything where a cycle begins."""
        for tensor in list(self._where):
            self._leave(tensor)
        self._of.clear()
        self._busy.clear()
        for tensor, frame in self._initial.items():
            self._place(tensor, frame)

    def find(self) -> list[set[int]]:
        """For each task the places of those that it follows. Raises the triggers of those for the next cycle to what
        they follow, also beyond the cycle's end."""
        at: dict[int, list[int]] = defaultdict(list)
        for place, task in enumerate(self.tasks[: self._n_inside]):
            at[2 * task.trigger + task.behind].append(place)
        for cycle in range(CYCLES):
            begins, first_run = cycle * self._n_ops, cycle * len(self.tasks)
            if not self._closed:
                self._begin()
            for position in range(self._n_ops):
                now = begins + position
                for place in at.get(2 * position, ()):
                    self._start(first_run + place, now)
                behind = {first_run + place for place in at.get(2 * position + 1, ())}
                self._perform(self._op(position), now, behind)
                for run in sorted(behind):
                    self._start(run, now + 1)
            self._start_wrapped(begins, first_run)
        found: list[set[int]] = [set() for _ in self.tasks]
        for run, after in self._after.items():
            found[run % len(self.tasks)].update(other % len(self.tasks) for other in after)
        return found

    def _start_wrapped(self, begins: int, first_run: int) -> None:
        """Tasks for the next cycle: no earlier than what they follow, and than those before them."""
        latest = 0
        for place in range(self._n_inside, len(self.tasks)):
            task = self.tasks[place]
            trigger = task.trigger
            if task.kind is not TaskKind.STORE:
                used_until, follows = self._conflicts(task)
                others = [self.tasks[run - first_run] for run in follows if run >= first_run]
                trigger = max(
                    trigger, latest, used_until + 1 - begins,
                    *(other.trigger + other.behind for other in others if other.kind is not TaskKind.STORE),
                )  # fmt: skip
                latest = trigger
                self.tasks[place] = replace(task, trigger=trigger)
            self._start(first_run + place, begins + trigger)

    def _op(self, position: int) -> Op:
        return self._work.trace.ops[position % len(self._work.trace.ops)]

    # ---- what a task has to do with ----------------------------------------------------------------------------

    def _of_room(self, room: TensorId) -> Conditional:
        conditional = self._work.trace.ops[-1 - room].conditional
        assert conditional is not None
        return conditional

    def _span(self, tensor: TensorId, frame: FrameId) -> tuple[list[TensorId | None], slice]:
        """The frames of a tensor's tier, and which of them it has if it begins at ``frame``."""
        size = self._work.frames(tensor) if tensor >= 0 else self._work.room_frames(self._of_room(tensor))
        return self._frames[self._tier(tensor)], slice(frame, frame + size)

    def _tier(self, tensor: TensorId) -> Tier:
        return self._work.tiers[tensor] if tensor >= 0 else self._of_room(tensor).tier

    def _place(self, tensor: TensorId, frame: FrameId) -> None:
        frames, span = self._span(tensor, frame)
        frames[span] = [tensor] * (span.stop - span.start)
        self._where[tensor] = frame

    def _leave(self, tensor: TensorId) -> None:
        frames, span = self._span(tensor, self._where.pop(tensor))
        frames[span] = [None] * (span.stop - span.start)
        runs, tier = self._of[tensor].made | self._of[tensor].reads, self._tier(tensor)
        if runs:
            self._busy.update(((tier, frame), runs) for frame in range(span.start, span.stop))

    @staticmethod
    def _takes(task: Task) -> bool:
        """Whether a task takes frames from others."""
        return task.frame != NO_FRAME and not task.behind and task.kind is not TaskKind.DOWNLOAD

    def _tenants(self, task: Task) -> set[TensorId]:
        """Who a task sends away."""
        if not self._takes(task):
            return set()
        frames, span = self._span(task.tensor, task.frame)
        return {owner for owner in frames[span] if owner is not None} | ({task.tensor} & self._where.keys())

    def _conflicts(self, task: Task) -> tuple[int, set[_Run]]:
        """The last op that a task has to let pass, and the tasks that it has to follow."""
        of, source = self._of[task.tensor], self._work.sources.get(task.tensor)
        follows: set[_Run] = set()
        used_until = -1
        if task.kind is TaskKind.STORE or task.behind or task.frame == NO_FRAME:
            follows |= of.made
        elif task.kind is TaskKind.DOWNLOAD:
            follows |= of.made | of.reads
            for copy in self._copies[task.tensor]:
                follows |= self._of[copy].made
        elif not task.fresh:
            follows |= of.stored if source is None else self._of[source.tensor].made
        for tenant in self._tenants(task):
            held = self._of[tenant]
            follows |= held.made | held.reads
            used_until = max(used_until, held.used_until)
        if self._busy and self._takes(task):
            _, span = self._span(task.tensor, task.frame)
            for frame in range(span.start, span.stop):
                follows |= self._busy.get((task.tier, frame), set())
        return used_until, follows

    def _start(self, run: _Run, now: int) -> None:
        """A task goes to its lane before op ``now``."""
        task = self.tasks[run % len(self.tasks)]
        if task.kind is TaskKind.UPDATE:
            self._update(run, now)
            return
        self._follow(run, self._conflicts(task)[1], now)
        of, source = self._of[task.tensor], self._work.sources.get(task.tensor)
        if task.kind is TaskKind.STORE:
            of.reads.add(run)
            of.stored = {run}
        elif task.kind is TaskKind.DOWNLOAD or task.behind:
            of.made, of.reads = {run}, set()
            if not task.behind:
                for copy in self._copies[task.tensor]:
                    self._of[copy].reads.add(run)
        elif task.frame == NO_FRAME:
            of.reads.add(run)
            of.out = {run}
        else:
            for tenant in self._tenants(task):
                self._leave(tenant)
            self._place(task.tensor, task.frame)
            _, span = self._span(task.tensor, task.frame)
            for frame in range(span.start, span.stop):
                self._busy.pop((task.tier, frame), None)
            of.made, of.reads, of.used_until = {run}, set(), -1
            if source is not None and not task.fresh:
                self._of[source.tensor].reads.add(run)

    def _follow(self, run: _Run, follows: Iterable[_Run], now: int) -> None:
        self._after[run] = {other for other in follows if self._over.get(other, now + 1) > now}

    # ---- ops ---------------------------------------------------------------------------------------------------

    def _update(self, run: _Run, now: int) -> None:
        """An op that is made beside compute."""
        accesses = self._op(now).accesses
        follows: set[_Run] = set()
        for access in accesses:
            of = self._of[access.tensor]
            follows |= of.made | (of.reads if access.mode in CHANGES else set())
        self._follow(run, follows, now)
        for access in accesses:
            of = self._of[access.tensor]
            if access.mode in CHANGES:
                of.made, of.reads = {run}, set()
            else:
                of.reads.add(run)
        if self._work.thread is Lane.UPDATE:
            self._is_over([run], now + 1)

    def _perform(self, op: Op, now: int, behind: set[_Run]) -> None:
        if op.lane is not Lane.COMPUTE:
            return
        until = now - now % len(self._work.trace.ops) + op.until
        if op.conditional is not None:
            room = self._of[room_of(now % len(self._work.trace.ops))]
            self._is_over(room.made, now + 1)
            room.used_until = until
        for access in op.accesses:
            of = self._of[access.tensor]
            if access.mode is AccessMode.DISCARD:
                continue
            of.used_until = max(of.used_until, until)
            self._is_over(of.made, now + 1)
            if access.via is not None and access.mode not in CHANGES:
                self._is_over(of.out, now + 1)
            if access.mode in CHANGES:
                self._is_over(of.reads, now + 1)
                of.made, of.reads = set(), set()
            if access.mode is AccessMode.CONSUME:
                of.reads |= behind

    def _is_over(self, runs: Iterable[_Run], now: int) -> None:
        """Tasks, and all that they follow, are over once op ``now`` begins."""
        left = list(runs)
        while left:
            run = left.pop()
            if run not in self._over:
                self._over[run] = now
                left.extend(self._after.get(run, ()))


def with_dependencies(
    work: Work,
    tasks: Sequence[Task],
    n_ops: int,
    n_wrapped: int,
    initial: Mapping[TensorId, FrameId],
    *,
    closed: bool,
) -> tuple[Task, ...]:
    """The tasks of a cycle with what each follows; see `Dependencies`.

    One for the next cycle that cannot start before is one of the cycle itself, first of all.
    """
    while True:
        found = Dependencies(work, tasks, n_ops, n_wrapped, initial, closed=closed)
        after = found.find()
        late = [place for place, task in enumerate(found.tasks) if task.trigger >= n_ops]
        if not late:
            return tuple(replace(task, after=tuple(sorted(own))) for task, own in zip(found.tasks, after, strict=True))
        first = [replace(found.tasks[p], trigger=0, needed_at=found.tasks[p].needed_at - n_ops) for p in late]
        tasks = [*first, *(task for place, task in enumerate(found.tasks) if place not in set(late))]
        n_wrapped -= len(late)
