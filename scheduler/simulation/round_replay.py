"""The updater on paper: which unit it serves, and the tasks of its slices, beside a simulated step. Pure.

It does as `scheduler.execution.round_follower` and the update thread do. Gradients of steps that arrive while their
unit waits are merged with it. The tasks of a slice are those of the round's plan where it is the plan's next, else they
come to the frames that the plan has for it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Final

from pagemem.frames.page import FrameId, TensorId
from pagemem.tier import Tier
from scheduler.planning.plan import Plan
from scheduler.planning.round_cursor import AHEAD, RoundCursor
from scheduler.planning.task import Lane, Task, TaskKind, load_task, store_task
from scheduler.planning.update_round import furthest_behind
from scheduler.planning.work import Work
from scheduler.simulation.lane_queues import Run
from scheduler.simulation.lanes import SimulatedLanes

#: Numbers of its runs, which are none of the step's.
_FIRST_RUN: Final = 1 << 40


class RoundReplay:
    """Serves the units of a round; see `scheduler.simulation.lane_queues.SecondThread`.

    Args:
        plan: of the step and of the round. work: what they were made of. lanes: those of the step.

    Attributes:
        missed: steps that the parameters of each late unit missed at their first use in a step, in order.
        moved_bytes: by lane.
    """

    def __init__(self, plan: Plan, work: Work, lanes: SimulatedLanes) -> None:
        assert plan.updates is not None and work.updates is not None
        self.missed: list[int] = []
        self.moved_bytes: dict[Lane, int] = dict.fromkeys(Lane, 0)
        self._updates, self._lanes = work.updates, lanes
        self._units = work.updates.units
        self._cursor = RoundCursor(plan.updates, work.updates)
        self._initial = plan.updates.initial
        self._frames_of = {tensor: -(-n // work.page_bytes) for tensor, n in work.updates.n_bytes.items()}
        self._op_of = {access.tensor: n for n, op in enumerate(work.updates.trace.ops) for access in op.accesses}
        self._n_ops = len(work.trace.ops)
        self._used_at: dict[int, list[int]] = defaultdict(list)
        self._given_at: dict[int, list[int]] = defaultdict(list)
        for number, unit in enumerate(self._units):
            self._used_at[unit.first_use].append(number)
            self._given_at[unit.handed_over].append(number)
        self._produced, self._applied = [0] * len(self._units), [0] * len(self._units)
        self._wanted: int | None = None
        self._unit: int | None = None
        self._last, self._op, self._batch = len(self._units) - 1, -1, 0
        self._began = False
        self._n_runs = _FIRST_RUN
        self._where: dict[TensorId, FrameId] = {}
        self._owners: dict[int, TensorId] = {}
        self._dirty: set[TensorId] = set()
        self._loading: dict[TensorId, int] = {}
        self._stored: dict[TensorId, int] = {}
        self._changed: dict[TensorId, int] = {}

    # ---- what the lanes tell -----------------------------------------------------------------------------------

    def too_late(self, position: int) -> TensorId | None:
        """As `SecondThread.too_late`."""
        used = self._used_at.get(position % self._n_ops, ())
        for number in used:
            if self._behind(number) > self._updates.max_staleness:
                self._wanted = number
                self._serve()
                return self._units[number].parameters
        self._wanted = None
        self.missed += [self._behind(number) for number in used]
        return None

    def performed(self, position: int) -> None:
        """As `SecondThread.performed`."""
        for number in self._given_at.get(position % self._n_ops, ()):
            self._produced[number] += 1
        self._serve()

    def noted(self, run: Run) -> None:
        """As `SecondThread.noted`."""
        if not self._began:
            self._began = True
            for task in self._cursor.upcoming(list(islice(self._following(), AHEAD))):
                self._bring(task.tensor, task.frame)
            return
        for access in self._updates.trace.ops[self._op].accesses:
            if access.tensor in self._dirty and self._cursor.streams(access.tensor):
                self._store(access.tensor)
        assert self._unit is not None
        if self._op + 1 < self._units[self._unit].ops.stop:
            self._begin(self._op + 1)
            return
        self._applied[self._unit] = self._batch
        self._last, self._unit = self._unit, None
        self._serve()

    def state(self) -> tuple[object, ...]:
        """As `SecondThread.state`."""
        behind = tuple(map(self._behind, range(len(self._units))))
        left = None if self._unit is None else self._produced[self._unit] - self._batch
        held = tuple(sorted((*self._where.items(),)))
        return behind, left, self._last, self._op, self._began, self._cursor.position, held

    # ---- units -------------------------------------------------------------------------------------------------

    def _behind(self, number: int) -> int:
        return self._produced[number] - self._applied[number]

    def _next_unit(self) -> int | None:
        """The one to be served when the one at hand, if there is one, is done."""
        wanted = self._wanted
        if wanted is not None and wanted != self._unit and self._behind(wanted) > 0:
            return wanted
        behind = [(n, self._behind(n)) for n in range(len(self._units)) if n != self._unit and self._behind(n) > 0]
        return furthest_behind(behind, self._last if self._unit is None else self._unit, len(self._units))

    def _serve(self) -> None:
        """Take the next batch, if there is one and none is at work."""
        if self._unit is not None:
            return
        self._unit = self._next_unit()
        if self._unit is None:
            return
        self._batch = self._produced[self._unit]
        ops = self._units[self._unit].ops
        if ops:
            self._begin(ops.start)
        else:
            self._applied[self._unit], self._last, self._unit = self._batch, self._unit, None
            self._serve()

    def _following(self) -> Iterator[int]:
        """Ops after the one at hand, as far as known."""
        assert self._unit is not None
        yield from range(self._op + 1, self._units[self._unit].ops.stop)
        unit = self._next_unit()
        if unit is not None:
            yield from self._units[unit].ops

    # ---- slices ------------------------------------------------------------------------------------------------

    def _begin(self, number: int) -> None:
        """Have a slice brought in and updated."""
        self._op, self._began = number, False
        op, frames = self._updates.trace.ops[number], self._cursor.go_to(number)
        for tensor, frame in frames.items():
            self._bring(tensor, frame)
        first = next(iter(frames), TensorId(-1))
        task = Task(TaskKind.UPDATE, first, Tier.HOST, Lane.UPDATE, sum(map(self._size, frames)), number)
        run = self._submit(task, [self._loading[t] for t in frames if t in self._loading], op.duration_s)
        for tensor in frames:
            self._dirty.add(tensor)
            self._changed[tensor] = run

    def _size(self, tensor: TensorId) -> int:
        return self._updates.n_bytes[tensor]

    def _bring(self, tensor: TensorId, frame: FrameId) -> None:
        """Have a tensor come, unless it is there or on its way; whoever is at its place is stored and leaves."""
        if tensor in self._where:
            return
        window = range(frame, frame + self._frames_of[tensor])
        follows: list[int] = []
        for tenant in {self._owners[place] for place in window if place in self._owners}:
            follows += self._leave(tenant)
        self._where[tensor] = frame
        self._owners.update(dict.fromkeys(window, tensor))
        if tensor in self._stored or tensor not in self._initial:
            if tensor in self._stored:
                follows.append(self._stored[tensor])
            task = load_task(tensor, self._size(tensor), frame, self._op, self._op_of[tensor])
            self._loading[tensor] = self._submit(task, follows)

    def _leave(self, tensor: TensorId) -> Sequence[int]:
        """Have a tensor give up its frames; returns what is to be over before they are another's."""
        if tensor in self._dirty:
            self._store(tensor)
        frame = self._where.pop(tensor)
        for place in range(frame, frame + self._frames_of[tensor]):
            del self._owners[place]
        runs = [self._stored.get(tensor), self._loading.pop(tensor, None), self._changed.get(tensor)]
        return [run for run in runs if run is not None]

    def _store(self, tensor: TensorId) -> None:
        self._dirty.discard(tensor)
        task = store_task(tensor, self._size(tensor), self._op)
        self._stored[tensor] = self._submit(task, [self._changed[tensor]] if tensor in self._changed else [])

    def _submit(self, task: Task, follows: Sequence[int], duration_s: float | None = None) -> int:
        run, self._n_runs = self._n_runs, self._n_runs + 1
        if task.kind is not TaskKind.UPDATE:
            self.moved_bytes[task.lane] += task.n_bytes
        self._lanes.submit(run, task, follows, duration_s)
        return run
