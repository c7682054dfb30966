"""Following a plan: which of its moves begin with an op, and when the step goes on without it.

    ON_DEMAND --(a repeatable step ended)--> PLANNED
    PLANNED   --(an op differs, or a load cannot start)--> ON_DEMAND, for the rest of the step

In PLANNED each op starts the moves the plan triggers there. A step that differs from its trace goes on on demand; its
record replaces the trace. The plan is made once more with the times of steps that followed it.

A plan that moves nothing need not be followed op by op. Once every tensor is where it has it, the plan *rests*: ops are
neither followed nor recorded, and those that use others than these tensors are fetched on demand, into free frames.
Once something has to leave for them, the step leaves the plan.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from typing import Final

from pagemem.errors import BudgetError
from pagemem.frames.page import TensorId
from pagemem.residency.mover import Mover
from pagemem.residency.paged_tensor import Residency
from pagemem.state_machine import StateMachine
from pagemem.telemetry.events import Event, EventKind, EventSink
from scheduler.execution.cursor import Cursor, Divergence
from scheduler.execution.lower_tier import LowerTier
from scheduler.execution.read_lane import ReadLane
from scheduler.execution.tier_planner import TierPlanner
from scheduler.planning.durations import Durations
from scheduler.planning.plan import Plan
from scheduler.planning.task import load_task
from scheduler.planning.trace import OpKey, Trace, TraceRecorder


class Mode(enum.Enum):
    """How ops get their tensors; see the diagram at the top of this module."""

    ON_DEMAND = "on demand"
    PLANNED = "planned"


_MOVES: Final = StateMachine("driver", {Mode.ON_DEMAND: {Mode.PLANNED}, Mode.PLANNED: {Mode.ON_DEMAND}})


class PlanFollower:
    """Makes and follows the plans of one tier. Training thread only, with the mover's lock held.

    Args:
        mover: owner of all residency.
        lane: starts planned loads.
        recorder: the ops of the step under way.
        planner: makes plans for the tier.
        sink: takes deviations.
        lower: the tier that tensors are copied up from; None above page files.

    Attributes:
        plan: the present plan, if there is one.
        trace: the step that it was made for, with the durations it was made with; empty without a plan.
        durations: of the ops of steps that followed it; once complete, the plan was made with them.
        planned_steps: that followed a plan. deviations: times that a step left its plan.
        rests: whether steps follow a plan that moves nothing, so that ops of its tensors may be left out.
        records_whole: whether all ops of the step under way are recorded.
        let_go: called before tensors may be moved, also when that ends: nobody of ours is to hold any between two uses.
    """

    def __init__(
        self,
        mover: Mover,
        lane: ReadLane,
        recorder: TraceRecorder,
        planner: TierPlanner,
        sink: EventSink,
        lower: LowerTier | None,
    ) -> None:
        self.mode = Mode.ON_DEMAND
        self.plan: Plan | None = None
        self.trace = Trace(())
        self.durations = Durations()
        self.planned_steps = 0
        self.deviations = 0
        self.rests = False
        self.records_whole = True
        self.let_go: Callable[[], None] = lambda: None
        self._residents: frozenset[TensorId] = frozenset()
        self._patience_steps = 1
        self._mover = mover
        self._lane = lane
        self._recorder = recorder
        self._planner = planner
        self._sink = sink
        self._lower = lower
        self._cursor = Cursor()
        self._steps_of_plan = 0

    def follow(self, key: OpKey) -> bool:
        """Take the step to ``key`` along the plan, starting what it triggers, or leave the plan.

        Returns:
            Whether the op is to be recorded.
        """
        plan = self.plan
        assert plan is not None
        if self.rests:
            return False
        if self._lower is not None and not self._recorder.ops:
            self._lower.step_begins()
        found = self._cursor.advance(plan, key)
        if isinstance(found, Divergence):
            self.leave(found.why)
            return True
        if found.restores:
            self._restore_placement(plan)
        for op in self.trace.ops[len(self._recorder.ops) :][: len(found.ops) - 1]:
            # An update that is not made in this step; it may be in later ones.
            self._recorder.begin(op.key, op.name, op.accesses)
        for position in found.ops:
            for store in plan.stores_at.get(position, ()):
                tensor = self._mover.tensors[store.tensor]
                tensor.to_store = tensor.state is Residency.ARRIVING
                if tensor.state is Residency.DIRTY and not tensor.pins:
                    self._mover.start_store(tensor)
            loads = plan.loads_at.get(position)
            if loads:
                self._lane.submit(loads)
        if self._lane.stuck:
            self._lane.pump()
        return True

    def resident_tensors(self) -> frozenset[TensorId]:
        """Between two steps: the tensors that the plan never moves, which are where it has them; from now on their ops
        may be left out. None of them where the plan moves some, or is not yet the one that is going to stay."""
        plan = self.plan
        if not self.rests and plan is not None and self._may_rest(plan):
            self.rests, self._residents = True, frozenset(plan.initial)
        return self._residents if self.rests else frozenset()

    def _may_rest(self, plan: Plan) -> bool:
        followed = self.mode is Mode.PLANNED and self.durations.complete and not self._cursor.restoring
        if not followed or self._steps_of_plan < self._patience_steps:
            return False
        # Frames for what is made and consumed in a step are found when they are asked for.
        moves = [task for task in (*plan.loads, *plan.stores, *plan.carried) if not task.fresh]
        n_frames = sum(self._mover.tensors[tensor].n_frames for tensor in self.trace.tensors())
        if moves or n_frames > plan.n_frames or self._lower is not None:
            return False
        placed = [(self._mover.tensors[tensor], frame) for tensor, frame in plan.initial.items()]
        return all(tensor.frame == frame and tensor.readable for tensor, frame in placed)

    def end_rest(self, why: str | None) -> bool:
        """Memory is short: leave the plan if it rests, see `leave`; returns whether it did."""
        if not self.rests:
            return False
        self.leave(why)
        return True

    def _end_rest(self) -> None:
        if self.rests:
            self.rests, self._residents = False, frozenset()
            self.let_go()

    def leave(self, why: str | None) -> None:
        """Go on on demand for the rest of the step; with a reason it counts as a deviation from the trace."""
        self._cancel_loads()
        if self.rests:
            self.records_whole = False
            # Steps of which every few ones need more room would gain nothing by a rest in between.
            self._steps_of_plan, self._patience_steps = 0, 2 * self._patience_steps
            self._end_rest()
        self.mode = _MOVES.move(self.mode, Mode.ON_DEMAND)
        if why is not None:
            self.deviations += 1
            self._emit_deviation(why)

    def disturb(self) -> None:
        """Something other than the plan is about to move tensors: the placement is restored before going on by plan."""
        self._cancel_loads()
        self._cursor.restoring = True

    def end_planned_step(self) -> bool:
        """End a step that followed the plan to its end; False: it did not."""
        self.records_whole = True
        if self.mode is not Mode.PLANNED or self.plan is None:
            return False
        if self.rests:
            self._recorder.finish(timed=False)
            self.planned_steps += 1
            return True
        if not self._cursor.end_step(self.plan):
            self.leave("the step ended early")
            return False
        for op in self.trace.ops[len(self._recorder.ops) :]:
            self._recorder.begin(op.key, op.name, op.accesses)
        performed = self._recorder.finish(timed=self.durations.wanted)
        if not self._steps_of_plan:
            self._mover.tenants.reset_touched()
        self._steps_of_plan += 1
        self.planned_steps += 1
        refined = self.durations.add(self.trace, performed)
        if refined is not None:
            self._plan_for(refined)
        return True

    def adopt(self, trace: Trace) -> None:
        """Go on by plan after a step on demand: by the present one if the step was as it expects, else by a new one.

        Where views in use leave the planner no window, steps stay on demand; that is counted and emitted.
        """
        if self.plan is None or self.plan.keys[: self.plan.ops_per_step] != trace.keys:
            self._forget_plan()
            self._plan_for(trace)
            if self.plan is None:
                return
        self._cursor.enter()
        self.mode = _MOVES.move(self.mode, Mode.PLANNED)

    def abandon_step(self) -> None:
        """The step under way is none: the next op is the first one of a step again."""
        self._lane.clear()
        if self.mode is Mode.PLANNED:
            self._cursor.enter()

    def invalidate(self) -> None:
        """Give the plan up; nobody's deviation."""
        if self.mode is Mode.PLANNED:
            self.leave(None)
        self._forget_plan()

    def _forget_plan(self) -> None:
        self._end_rest()
        self.plan, self.trace, self.durations = None, Trace(()), Durations()

    def _plan_for(self, trace: Trace) -> None:
        """Make a plan and take it for the next step on; where there is none, the present one stays.

        Raises:
            PlanError: the plan does not hold, which is a defect; it is not followed.
        """
        try:
            plan = self._planner.plan(trace)
        except BudgetError as error:
            self._emit_deviation(f"no plan: {error}")
            return
        self.trace, self.plan = trace, plan
        self._steps_of_plan = 0
        self.disturb()

    def _restore_placement(self, plan: Plan) -> None:
        """Put every tensor where the plan's cycle begins, and queue the loads that would be under way then.

        Only what costs nothing is moved out here; the lane makes dirty tenants leave when a load wants their frames.
        """
        self._lane.clear()
        for tensor in self._mover.tensors.values():
            movable = tensor.state is Residency.CLEAN and not tensor.held and not tensor.uploads
            if not movable or plan.initial.get(tensor.id) == tensor.frame:
                continue
            if tensor.frame is not None and tensor.frame < self._mover.tenants.n_shared_frames:
                self._mover.drop(tensor)
        first_uses = self.trace.first_uses()
        wanted = sorted(plan.initial, key=lambda tensor: first_uses.get(tensor, 0))
        n_bytes = {tensor: self._mover.tensors[tensor].n_bytes for tensor in wanted}
        self._lane.submit([load_task(tensor, n_bytes[tensor], plan.initial[tensor], 0, 0) for tensor in wanted])
        self._lane.submit(plan.carried)

    def _cancel_loads(self) -> None:
        self._lane.clear()
        if self._lower is not None:
            self._lower.cancel_loads()

    def _emit_deviation(self, why: str) -> None:
        self._sink.emit(Event(EventKind.DEVIATION, why, 0, time.perf_counter(), 0.0))
