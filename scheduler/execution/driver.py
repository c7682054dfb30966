"""Executes training ops over paged tensors: follows the plan while the step is the traced one, fetches on demand
otherwise.

    ON_DEMAND --(a repeatable step ended)--> PLANNED
    PLANNED   --(an op differs, or a load cannot start)--> ON_DEMAND, for the rest of the step

In ON_DEMAND each op fetches what it lacks, synchronously, in place of the least recently used tensors, and is recorded;
from the record of a whole step a plan is made. In PLANNED each op starts the moves the plan triggers there, and the
training thread waits only for what its own op needs. A step that differs from its trace is still executed correctly;
its record replaces the trace. Ops in an `untraced` (evaluation between steps) are fetched on demand and not recorded.

Everything here runs on the training thread; the copies run on the page files' threads and report to the mover.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, Final

from pagemem.errors import BudgetError
from pagemem.frames.page import TensorId
from pagemem.process.closing import close_all
from pagemem.residency.mover import Mover
from pagemem.residency.paged_tensor import PagedTensor, Residency
from pagemem.state_machine import StateMachine
from pagemem.telemetry.events import Event, EventKind, EventSink, Watcher
from pagemem.telemetry.recorder import WaitCause
from scheduler.execution.cursor import Cursor, Divergence
from scheduler.execution.pinning import Holding
from scheduler.execution.read_lane import ReadLane
from scheduler.execution.tier_planner import Planning
from scheduler.execution.wait_explainer import WaitExplainer
from scheduler.planning.durations import Durations
from scheduler.planning.plan import LoadTask, Plan
from scheduler.planning.trace import CHANGES, Access, AccessMode, Clock, HostClock, OpKey, Trace, TraceRecorder


class Mode(enum.Enum):
    """How ops get their tensors; see the diagram at the top of this module."""

    ON_DEMAND = "on demand"
    PLANNED = "planned"


_MOVES: Final = StateMachine("driver", {Mode.ON_DEMAND: {Mode.PLANNED}, Mode.PLANNED: {Mode.ON_DEMAND}})


class Driver(Holding):
    """Gives the training thread its tensors, op by op.

    Args:
        mover: owner of all residency.
        sink: takes waits and deviations.
        bandwidth: current page-file bandwidths (read, write) in bytes/s, asked for when a plan is made.
        overhead_bytes: what the budget holds beside the arena; part of the budget that an error proposes.
        clock: times ops; None: the training thread's own.

    Attributes:
        watcher: is told of ops and steps, while somebody profiles.
        above: the driver of the tier above, whose steps end when this one's do.
        planning: makes plans for this tier.
    """

    #: Whether every planned step has to have the same moves.
    single_step_cycle: ClassVar[bool] = False
    #: Whether a watcher hears of the ends of steps from this driver.
    tells_of_steps: ClassVar[bool] = True

    def __init__(
        self,
        mover: Mover,
        sink: EventSink,
        bandwidth: Callable[[], tuple[float, float]],
        overhead_bytes: int = 0,
        clock: Clock | None = None,
    ) -> None:
        super().__init__(mover, overhead_bytes)
        self.mode = Mode.ON_DEMAND
        self.plan: Plan | None = None
        self.planned_steps = 0
        self.on_demand_steps = 0
        self.deviations = 0
        self.watcher: Watcher | None = None
        self.above: Driver | None = None
        self._sink = sink
        self.planning = Planning(mover, bandwidth, single_step_cycle=self.single_step_cycle)
        self._lane = ReadLane(mover)
        self._recorder = TraceRecorder(clock or HostClock())
        self._trace = Trace(())
        self._durations = Durations()
        self._steps_of_plan = 0
        self._unsettled_steps = 0
        self._recording = True
        self._cursor = Cursor()

    @property
    def overhead_bytes(self) -> int:
        """What the budget holds beside the arena; part of the budget that an error proposes."""
        return self._on_demand.overhead_bytes

    @overhead_bytes.setter
    def overhead_bytes(self, n_bytes: int) -> None:
        self._on_demand.overhead_bytes = n_bytes

    # ---- ops ---------------------------------------------------------------------------------------------------

    @contextmanager
    def op(self, key: OpKey, name: str, accesses: Sequence[Access]) -> Iterator[None]:
        """One op: its tensors are in host memory and do not move inside the block.

        Raises:
            BudgetError: they do not fit together with what is held; nothing was lost.
            StorageError: a page file failed; every tensor is whole where it was.
        """
        held = self.begin(key, name, accesses)
        try:
            yield
        finally:
            self.end(held)

    def begin(self, key: OpKey, name: str, accesses: Sequence[Access]) -> list[PagedTensor]:
        """Begin an op, see `op`; returns what `end` must be given."""
        if self._recording:
            self._recorder.pause()
        watcher = self.watcher
        if watcher is not None:
            watcher.ends()
        with self.mover.changed:
            self.mover.monitor.check()
            self._collect_views()
            if self._recording:
                if self.mode is Mode.PLANNED:
                    self._follow(key)
                self._recorder.begin(key, name, accesses)
            held = self._hold(name, [access for access in accesses if access.mode is not AccessMode.RENEW])
        if watcher is not None:
            watcher.begins(key[0].value, name, held[0].name if held else "", sum(tensor.n_bytes for tensor in held))
        # A plan that is to stay needs no times, and a device takes two marks for each.
        if self._recording and (self.mode is Mode.ON_DEMAND or self._durations.wanted):
            self._recorder.go_on()
        return held

    def end(self, held: Sequence[PagedTensor]) -> None:
        """End an op: its tensors may move again, unless views of them live on."""
        with self.mover.changed:
            for tensor in held:
                tensor.pins -= 1
            if self._lane.stuck:
                self._lane.pump()

    @contextmanager
    def in_passing(self, tensor: PagedTensor) -> Iterator[bool]:
        """Outside of any op, and without moving anything: inside the block a tensor may be changed, if it is in memory
        and free for that.

        Yields whether it is.
        """
        with self.mover.changed:
            at_hand = tensor.readable and not tensor.snapshot_pending and not tensor.uploads
            if at_hand:
                tensor.pins += 1
                self.mover.touch(tensor)
        try:
            yield at_hand
        finally:
            if at_hand:
                self.end([tensor])

    def viewed(self, tensor: PagedTensor) -> bool:
        """Whether somebody has a view of a tensor."""
        if not tensor.leases:
            return False
        with self.mover.changed:
            self._collect_views()
            return tensor.leases > 0

    def consume(self, tensor: PagedTensor) -> None:
        """Declare a tensor's content dead, after the op that consumed it has ended."""
        self.mover.monitor.wait_until(lambda: not tensor.moving, tensor.name, tensor.n_bytes)
        self.mover.discard(tensor)

    def end_step(self, *, repeatable: bool) -> None:
        """The optimizer step is made: the ops since the last call are one step.

        Args:
            repeatable: whether the next step is expected to have the same ops (not so for a first step).
        """
        self._recorder.pause()
        if self.watcher is not None and self.tells_of_steps:
            self.watcher.step_ends()
        if self._unsettled_steps:
            self._unsettled_steps -= 1
            repeatable = False
        asked_otherwise = self.above is not None and self._ends_above(repeatable=repeatable)
        with self.mover.changed:
            self._collect_views()
            if self.mode is Mode.PLANNED and self.plan is not None and self._cursor.end_step(self.plan):
                for op in self._trace.ops[len(self._recorder.ops) :]:
                    self._recorder.begin(op.key, op.name, op.accesses)
                self._planned_step_ended(self._recorder.finish(timed=self._durations.wanted))
                if asked_otherwise:
                    self._leave_plan(None)
                return
            if self.mode is Mode.PLANNED:
                self._leave_plan("the step ended early")
            self.on_demand_steps += 1
            trace = self._recorder.finish(timed=repeatable)
            if repeatable and self.plan is not None:
                trace.take_durations(self._trace)  # of ops that followed the plan before this step left it
            # A step may ask nothing of this tier, where all it needs is at home above.
            if (
                repeatable
                and not asked_otherwise
                and (trace.ops or (self.above is not None and self.above.plan is not None))
            ):
                self._adopt(trace)

    def abandon_step(self) -> None:
        """Forget the ops since the last step's end: they are no step. The next op is the first one of a step again."""
        if self.above is not None:
            self.above.abandon_step()
        if self.watcher is not None:
            self.watcher.ends()
        with self.mover.changed:
            self._collect_views()
            if not self._recorder.ops:
                return
            self._recorder.finish(timed=False)
            self._lane.clear()
            if self.mode is Mode.PLANNED:
                self._cursor.enter()

    def invalidate_plan(self, steps: int) -> None:
        """Between two steps: the next ones have other ops than those until now, and so many of them are not yet like
        those after.

        They are fetched on demand, then there is a plan anew. Nobody's deviation.
        """
        if self.above is not None:
            self.above.invalidate_plan(steps)
        with self.mover.changed:
            self._unsettled_steps = steps
            if self.mode is Mode.PLANNED:
                self._leave_plan(None)
            self.plan = None

    def _ends_above(self, *, repeatable: bool) -> bool:
        """End the step of the tier above; returns whether it goes on by another plan, so that it will ask for other
        things."""
        assert self.above is not None
        plan = self.above.plan
        self.above.end_step(repeatable=repeatable)
        return self.above.plan is not plan

    @contextmanager
    def untraced(self) -> Iterator[None]:
        """Ops inside are not part of a step: they are fetched on demand and leave the trace as it is."""
        recording, computing = self._recording, self._recorder.computing
        if recording:
            self._recorder.pause()
            self._disturb()
        self._recording = False
        try:
            yield
        finally:
            self._recording = recording
            if recording and computing:
                self._recorder.go_on()

    @property
    def trace(self) -> Trace:
        """The step that the plan was made for, with the durations it was made with; empty without a plan."""
        return self._trace if self.plan is not None else Trace(())

    @property
    def timed(self) -> bool:
        """Whether the plan was made with the times of steps that followed one."""
        return self.plan is not None and self._durations.complete

    @property
    def position(self) -> int:
        """Ops of the step under way so far."""
        return len(self._recorder.ops)

    @property
    def in_step(self) -> bool:
        """Whether ops are part of a step, not of an `untraced`."""
        return self._recording

    def quiesce(self) -> None:
        """Stop reading ahead and wait until no copy is under way, also after an error, and where the tier above fails
        in that."""
        close_all(*([] if self.above is None else [self.above.quiesce]), self._disturb, self.mover.monitor.settle)

    def evict_all(self) -> None:
        """Store what is dirty and give all host frames up.

        Raises:
            AssertionError: something is held. StorageError: a copy failed; it is still whole in host memory.
        """
        self.quiesce()
        self._collect_views()
        self.mover.store_all()
        for tensor in self.mover.tensors.values():
            if tensor.state is Residency.CLEAN and not tensor.resident:
                self.mover.drop(tensor)

    # ---- following the plan ------------------------------------------------------------------------------------

    def _adopt(self, trace: Trace) -> None:
        """Go on by plan: the present one if the step was as it expects, else a new one.

        Where views in use leave the planner no window, steps stay on demand; that is counted and emitted.
        """
        if self.plan is None or self.plan.keys[: self.plan.ops_per_step] != trace.keys:
            self.plan, self._durations = None, Durations()
            self._plan_for(trace)
            if self.plan is None:
                return
        self._cursor.enter()
        self.mode = _MOVES.move(self.mode, Mode.PLANNED)

    def _plan_for(self, trace: Trace) -> None:
        """Make a plan and take it for the next step on; where there is none, the present one stays.

        Raises:
            PlanError: the plan does not hold, which is a defect; it is not followed.
        """
        try:
            plan = self.planning.plan(trace)
        except BudgetError as error:
            self._sink.emit(Event(EventKind.DEVIATION, f"no plan: {error}", 0, time.perf_counter(), 0.0))
            return
        self._trace, self.plan = trace, plan
        self._steps_of_plan = 0
        self._disturb()

    def _planned_step_ended(self, performed: Trace) -> None:
        """Count a step that followed the plan, and make the plan anew once it is known how long its ops really take."""
        if not self._steps_of_plan:
            self.mover.tenants.reset_touched()
        self._steps_of_plan += 1
        self.planned_steps += 1
        refined = self._durations.add(self._trace, performed)
        if refined is not None:
            self._plan_for(refined)

    def _follow(self, key: OpKey) -> None:
        """Take the step to ``key`` along the plan, starting what it triggers, or leave the plan."""
        plan = self.plan
        assert plan is not None
        found = self._cursor.advance(plan, key)
        if isinstance(found, Divergence):
            self._leave_plan(found.why)
            return
        if found.restores:
            self._restore_placement(plan)
        for op in self._trace.ops[len(self._recorder.ops) :][: len(found.ops) - 1]:
            self._recorder.begin(
                op.key, op.name, op.accesses
            )  # An update that is not made in this step; it may be in later ones.
        for position in found.ops:
            for store in plan.stores_at.get(position, ()):
                tensor = self.mover.tensors[store.tensor]
                tensor.to_store = tensor.state is Residency.ARRIVING
                if tensor.state is Residency.DIRTY and not tensor.pins:
                    self.mover.start_store(tensor)
            loads = plan.loads_at.get(position)
            if loads:
                self._lane.submit(loads)
        if self._lane.stuck:
            self._lane.pump()

    def _leave_plan(self, why: str | None) -> None:
        """Go on on demand for the rest of the step; with a reason it counts as a deviation from the trace."""
        self._lane.clear()
        self.mode = _MOVES.move(self.mode, Mode.ON_DEMAND)
        if why is not None:
            self.deviations += 1
            self._sink.emit(Event(EventKind.DEVIATION, why, 0, time.perf_counter(), 0.0))

    def causes(self) -> Callable[[str], WaitCause]:
        """Who says what a wait has to wait for."""
        return WaitExplainer(self.mover, self._lane)

    def _disturb(self) -> None:
        """Something other than the plan is about to move tensors: the placement is restored before going on by plan."""
        self._lane.clear()
        self._cursor.restoring = True

    def _restore_placement(self, plan: Plan) -> None:
        """Put every tensor where the plan's cycle begins, and queue the loads that would be under way then.

        Only what costs nothing is moved out here; the lane makes dirty tenants leave when a load wants their frames.
        """
        self._lane.clear()
        for tensor in self.mover.tensors.values():
            if (
                tensor.state is not Residency.CLEAN
                or tensor.held
                or tensor.uploads
                or plan.initial.get(tensor.id) == tensor.frame
            ):
                continue
            if tensor.frame is not None and tensor.frame < self.mover.tenants.n_shared_frames:
                self.mover.drop(tensor)
        first_use = self._first_uses()
        wanted = sorted(plan.initial, key=lambda tensor: first_use.get(tensor, 0))
        self._lane.submit([LoadTask(tensor, plan.initial[tensor], 0, 0) for tensor in wanted])
        self._lane.submit(plan.carried)

    def _first_uses(self) -> dict[TensorId, int]:
        """The first op of the plan's step that uses each tensor."""
        found: dict[TensorId, int] = {}
        for index, op in enumerate(self._trace.ops):
            for access in op.accesses:
                found.setdefault(access.tensor, index)
        return found

    # ---- having tensors at hand --------------------------------------------------------------------------------

    def _collect_views(self) -> None:
        for tensor in self.mover.collect_leases():
            if self._recording:
                self._recorder.views_ended(tensor.id)

    def _make_usable(self, tensor: PagedTensor, mode: AccessMode, name: str) -> None:
        # Outside a step nobody says whether a tensor is going to be changed.
        if tensor.snapshot_pending and (mode in CHANGES or not self._recording):
            self.mover.make_writable(tensor)

        def usable() -> bool:
            # A tensor that waits in the lane is about to move to where the plan has it, out of another one's way.
            return self._usable(tensor, mode) and tensor.id not in self._lane

        def hopeless() -> bool:
            if tensor.moving:
                return False
            return self._lane.stuck or tensor.id not in self._lane

        self.mover.monitor.wait_until(lambda: usable() or hopeless(), tensor.name, tensor.n_bytes)
        if usable():
            return
        if self.mode is Mode.PLANNED and self._recording:
            self._leave_plan(f"{name}: the plan has not brought {tensor.name}")
        if self._usable(tensor, mode):
            return
        self._on_demand.fetch(tensor, name, fresh=mode is AccessMode.CREATE)
