"""Checks a plan frame by frame, knowing nothing of how it was made, and stops at the first thing that cannot be.

However long ops and tasks take: a task is taken for over only where that is certain, because an op has waited for it,
or because the task in question follows it, directly or by others. That lanes serve in order is not relied upon.
Contents are version numbers: what was written last, what is in each frame and what is in the page files must agree
whenever an op or a task looks. Shares no code with the planner, only the types that both read.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Final, Protocol

from pagemem.frames.page import FrameId, TensorId
from pagemem.tier import Tier
from scheduler.planning.machine import Machine, TierSpec
from scheduler.planning.plan import Plan
from scheduler.planning.replayed_frames import PlanError as PlanError
from scheduler.planning.replayed_frames import ReplayedFrames
from scheduler.planning.sources import TensorSource
from scheduler.planning.task import NO_FRAME, NO_OP, Lane, Task, TaskKind, load_task, store_task
from scheduler.planning.trace import CHANGES, Access, AccessMode, Op, Trace
from scheduler.planning.work import Work

#: Cycles that `check_bounds` performs: in the second one, tensors are dirty when it begins, as in every later one.
CYCLES: Final = 2
#: A tensor that never moves is in use until then.
_FOR_GOOD: Final = sys.maxsize


def check_bounds(
    plan: Plan,
    trace: Trace,
    n_bytes: Mapping[TensorId, int],
    tiers: Machine | TierSpec,
    resident: Mapping[TensorId, FrameId] | None = None,
    sources: Mapping[TensorId, TensorSource] | None = None,
) -> None:
    """Perform a plan for some cycles and prove that it can be followed; see `check_work`.

    Raises:
        PlanError: something does not hold; names the first op and tensor.
    """
    check_work(plan, Work.of(trace, n_bytes, tiers, resident, sources))


def check_work(plan: Plan, work: Work) -> None:
    """Perform a plan for some cycles and prove that it can be followed.

    Proven for every op: its tensors are whole in frames of their tier when it begins, and of the newest version; of
    every task: its source is there, and newest; no frame has two tenants; nothing leaves its frames that is in use by
    an op, a view or a task, or whose content is nowhere below; the room of a conditional op is there; no more frames
    are used than there are.

    The plan of the updates beside it likewise, and that its frames are none of the step's.

    Args:
        work: what the plan was made of.

    Raises:
        PlanError: something does not hold; names the first op and tensor.
    """
    replay = Replay(work, plan)
    for tier, n_frames in plan.frames.items():
        there = work.machine.n_frames.get(tier, 0)
        replay.require(n_frames <= there, f"the plan has {n_frames} frames of {tier.value}, there are {there}")
    for _ in range(CYCLES):
        replay.cycle()
    for tier, touched in replay.frames.touched.items():
        said = plan.peaks.get(tier, 0)
        replay.require(said >= len(touched), f"{len(touched)} frames are touched, the plan says {said}")
    replay.require((plan.updates is None) == (work.updates is None), "the updates beside the step are not planned")
    if plan.updates is not None and work.updates is not None:
        first, taken = work.updates.first_frame, plan.frames.get(Tier.HOST, 0)
        replay.require(taken <= first, f"updates have frames from {first} on, the step has {taken}")
        check_work(plan.updates, work.of_updates())


class Lanes(Protocol):
    """Is told of a replay as it goes on, see `scheduler.simulation.lanes`."""

    def start(
        self, run: int, task: Task, follows: Iterable[int], duration_s: float | None = None, *, needs_lane: bool = True
    ) -> None:
        """A task goes to its lane."""

    def perform(self, op: Op, position: int, waits_for: Iterable[int]) -> None:
        """An op of compute waits for runs of tasks and is made."""


class Replay:
    """Frames, contents and tasks under a plan. ``now`` counts ops over all cycles.

    Args:
        work: what the plan was made of.
        lanes: is told of every task and op.

    Raises:
        PlanError: the plan is not one of this trace, or cannot begin.
    """

    def __init__(self, work: Work, plan: Plan, lanes: Lanes | None = None) -> None:
        self.work = work
        self.plan = plan
        self.lanes = lanes
        self.now = 0
        self.moved_bytes: dict[Lane, int] = dict.fromkeys(Lane, 0)
        self.frames = ReplayedFrames(work, plan.frames)
        self._n_runs = 0
        self._run_of: dict[int, int] = {}  # the last run of each task, by its place
        self._before: dict[int, frozenset[int]] = {}  # what is over when a run begins, but for what the op's is
        self._over: dict[int, int] = {}  # the op from whose beginning on a run is known to be over
        self._restoring: set[int] = set()
        self._places = {id(task): place for place, task in enumerate(plan.tasks)}
        self._check_form()
        for tensor, frame in work.resident.items():
            self.require(
                plan.initial.get(tensor) == frame, f"{tensor} is resident at frame {frame} and not planned there"
            )
            self.frames.locked_until[tensor] = _FOR_GOOD
        for tensor, frame in plan.initial.items():
            self.require(tensor in work.tiers, f"{tensor} is placed and never used")
            self.frames.place(tensor, frame, self.now)
            self.frames.here[tensor] = 0
        self._carry()

    def _check_form(self) -> None:
        plan, trace = self.plan, self.work.trace
        n_ops = len(plan.keys)
        self.require(n_ops == plan.n_steps * len(trace.ops), "the plan has another number of ops")
        self.require(plan.keys == trace.keys * plan.n_steps, "the plan expects other ops")
        triggers = [task.trigger for task in plan.tasks if task.kind is TaskKind.LOAD]
        self.require(triggers == sorted(triggers), "loads start in another order than they stand in")
        self.require(all(0 <= task.trigger < n_ops for task in plan.tasks), "a task is triggered by no op of the cycle")
        self.require(
            all(0 <= place < len(plan.tasks) for task in plan.tasks for place in task.after),
            "a task follows one that the plan does not have",
        )
        for position in range(n_ops):
            op = trace.ops[position % len(trace.ops)]
            tasks, behind = plan.tasks_at.get(position, ()), plan.behind_at.get(position, ())
            updates = sum(task.kind is TaskKind.UPDATE for task in tasks)
            wanted = op.lane is Lane.UPDATE and bool(op.accesses)
            self.require(wanted == updates, f"{op.name} has {updates} updates", position)
            for access in op.accesses:
                if access.via is not None:
                    ways = behind if access.mode in CHANGES else [t for t in tasks if t.frame == NO_FRAME]
                    there = any(task.kind is access.via and task.tensor == access.tensor for task in ways)
                    self.require(there, f"{op.name} has no {access.via.value} of {access.tensor}", position)

    def require(self, holds: bool, otherwise: str, now: int | None = None) -> None:
        """Stop unless something holds."""
        if not holds:
            raise PlanError(f"op {self.now if now is None else now}: {otherwise}")

    @property
    def where(self) -> dict[TensorId, int]:
        """First frame of what is in frames."""
        return self.frames.where

    @property
    def touched(self) -> set[int]:
        """Frames of host memory that were used."""
        return self.frames.touched[Tier.HOST]

    # ---- tasks -------------------------------------------------------------------------------------------------

    def _start(self, task: Task, place: int | None) -> None:
        """A task goes to its lane: it is proven that what it needs is over by then, or followed."""
        run, self._n_runs = self._n_runs, self._n_runs + 1
        level = self.now
        follows = {self._run_of[other] for other in task.after if other in self._run_of}
        if self._restoring:  # What has put the first placement up is no task of the plan, and followed by all.
            for tensor in self._uses(task):
                follows |= self.frames.made[tensor] & self._restoring
            if task.frame != NO_FRAME:
                follows |= self.frames.busy(task.tensor, task.frame, self.now) & self._restoring
        before = frozenset().union(follows, *(self._before.get(other, frozenset()) for other in follows))
        # No task starts between an op's wait and the next op, from which on what was waited for is over.
        self._before[run] = before.difference(self._over)
        if place is not None:
            self._run_of[place] = run
        self.frames.known = (level, self._before[run], self._over)
        moves = self._act(task, run) and not task.fresh
        if moves:
            self.moved_bytes[task.lane] += task.n_bytes
        if self.lanes is not None:
            duration_s = None if moves else 0.0
            if task.kind is TaskKind.UPDATE:
                duration_s = self.work.trace.ops[self.now % len(self.work.trace.ops)].duration_s
            self.lanes.start(run, task, follows, duration_s, needs_lane=moves)

    def _uses(self, task: Task) -> set[TensorId]:
        """Tensors that a task has to do with."""
        if task.kind is TaskKind.UPDATE:
            return {access.tensor for access in self.work.trace.ops[self.now % len(self.work.trace.ops)].accesses}
        found = {task.tensor, *self.frames.copies(task.tensor)}
        if task.tensor in self.work.sources:
            found.add(self.work.sources[task.tensor].tensor)
        if task.frame != NO_FRAME:
            found |= self.frames.tenants(task.tensor, task.frame, self.now)
        return found

    def _act(self, task: Task, run: int) -> bool:
        """Do what a task does; returns whether there was anything to do."""
        frames, tensor = self.frames, task.tensor
        if task.kind is TaskKind.UPDATE:
            self._update(run)
            return True
        if task.kind is TaskKind.STORE:
            return frames.store(tensor, run, self.now)
        if task.behind:
            frames.arrive(tensor, task.frame, run, self.now)
            return True
        if task.kind is TaskKind.DOWNLOAD:
            return frames.write_back(tensor, task.frame, run, self.now)
        if task.frame == NO_FRAME:
            frames.read(tensor, run, self.now)
            frames.out[tensor] = {run}
            return True
        self.require(task.trigger <= task.needed_at, f"{tensor} comes too late for op {task.needed_at}")
        self.require(
            frames.is_for(tensor, self.work.trace.ops[task.needed_at % len(self.work.trace.ops)]),
            f"{tensor} is not for op {task.needed_at}",
        )
        return frames.bring(tensor, task.frame, run, self.now, fresh=task.fresh)

    def _update(self, run: int) -> None:
        """An update that a worker makes: its tensors are there, newest, and not read any more where it changes them."""
        op = self.work.trace.ops[self.now % len(self.work.trace.ops)]
        for access in op.accesses:
            self._look(op, access)
            self.frames.follow(access.tensor, self.now, reads=access.mode in CHANGES)
        for access in op.accesses:
            self._change(access, {run})

    # ---- ops ---------------------------------------------------------------------------------------------------

    def cycle(self) -> None:
        """Perform all ops of one cycle, after having restored its first placement where the one before ended with
        another."""
        if self.now and not self.plan.closed:
            self._restore()
        n_ops = len(self.work.trace.ops)
        for position in range(len(self.plan.keys)):
            tasks = self.plan.tasks_at.get(position, ())
            for task in tasks:
                self._start(task, self._places[id(task)])
            op = self.work.trace.ops[position % n_ops]
            if op.lane is Lane.COMPUTE:
                self._perform(op, position, until=self.now - position % n_ops + op.until)
            elif op.lane is self.work.thread:
                self._is_over({self._run_of[self._places[id(t)]] for t in tasks if t.kind is TaskKind.UPDATE})
            self.now += 1
            behind = self.plan.behind_at.get(position, ())
            for task in behind:
                self._start(task, self._places[id(task)])
            if behind:
                runs = {self._run_of[self._places[id(task)]] for task in behind}
                self.frames.sent({a.tensor for a in op.accesses if a.mode is AccessMode.CONSUME}, runs)
            self.frames.free_dead(self.now)

    def _perform(self, op: Op, position: int, until: int) -> None:
        """Let an op look at its tensors and change them."""
        waits_for: set[int] = set()
        for access in op.accesses:
            if access.mode is AccessMode.DISCARD:
                continue
            self._look(op, access)
            waits_for |= self.frames.waits(access)
        if op.conditional is not None:
            n_frames = self.work.room_frames(op.conditional)
            found = self.frames.room(self.now % len(self.work.trace.ops), op.conditional.tier, n_frames)
            self.require(found is not None, f"{op.name} has no room of {n_frames} frames for what it may use")
            waits_for |= found or set()
            self.frames.lock(TensorId(-1 - self.now % len(self.work.trace.ops)), until)
        self._is_over(waits_for)
        for access in op.accesses:
            if access.mode is not AccessMode.DISCARD:
                self.frames.lock(access.tensor, until)
            self._change(access, set())
        if self.lanes is not None:
            self.lanes.perform(op, position, sorted(waits_for))
        if op.conditional is not None:
            self.frames.dead.add(TensorId(-1 - self.now % len(self.work.trace.ops)))

    def _look(self, op: Op, access: Access) -> None:
        """An op's tensor is whole, and newest."""
        problem = self.frames.problem(access)
        self.require(problem is None, f"{op.name} {problem}")

    def _change(self, access: Access, by: set[int]) -> None:
        """What becomes of a tensor in an op, or in the task that performs it."""
        self.frames.change(access, by, self.now)

    def _is_over(self, runs: Iterable[int]) -> None:
        """The op under way has waited for runs of tasks, and so for what those followed."""
        for run in runs:
            for over in (run, *self._before.get(run, ())):
                if self._over.setdefault(over, self.now + 1) > self.now + 1:
                    self._over[over] = self.now + 1

    def _carry(self) -> None:
        """Start what a cycle before would have started for this one."""
        n_ops = len(self.plan.keys)
        places = [place for place, task in enumerate(self.plan.tasks) if task.needed_at >= n_ops]
        known = len(places) == len(self.plan.carried)
        for index, task in enumerate(self.plan.carried):
            self._start(task, places[index] if known else None)

    def _restore(self) -> None:
        """Between two cycles of a plan that does not close: put every tensor where a cycle begins."""
        frames, initial, n_bytes = self.frames, self.plan.initial, self.work.n_bytes
        left: dict[int, set[int]] = {}  # by frame, the runs after which it is free
        self._over = dict.fromkeys(range(self._n_runs), self.now)
        frames.known = (self.now, frozenset(), self._over)
        self._restoring.clear()
        for tensor in sorted(tensor for tensor, frame in frames.where.items() if initial.get(tensor) != frame):
            runs = frames.made[tensor] | frames.reads[tensor]
            if frames.is_dirty(tensor):
                task = store_task(tensor, n_bytes[tensor], 0)
                runs = runs | {self._begin(task, set())}
                self._over[self._n_runs - 1] = self.now
                frames.store(tensor, self._n_runs - 1, self.now)
            if frames.tier(tensor) is Tier.HOST:
                left.update(dict.fromkeys(frames.window(tensor, frames.where[tensor], self.now), runs))
            frames.leave(tensor, self.now)
        first_uses = self.work.trace.first_uses()
        for tensor in sorted(initial, key=lambda tensor: (first_uses.get(tensor, 0), tensor)):
            if tensor not in frames.where:
                follows = set().union(*(left.get(f, set()) for f in frames.window(tensor, initial[tensor], self.now)))
                run = self._begin(load_task(tensor, n_bytes[tensor], initial[tensor], 0, NO_OP), follows)
                frames.bring(tensor, initial[tensor], run, self.now, fresh=False)
                self._restoring.add(run)
        self._carry()

    def _begin(self, task: Task, follows: set[int]) -> int:
        """A task that restores the placement goes to its lane; nothing of the cycle before is under way any more."""
        run, self._n_runs = self._n_runs, self._n_runs + 1
        self._before[run] = frozenset()
        self.frames.known = (self.now, frozenset(), self._over)
        self.moved_bytes[task.lane] += task.n_bytes
        if self.lanes is not None:
            self.lanes.start(run, task, follows)
        return run
