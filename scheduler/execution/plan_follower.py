"""Following plans: which moves begin with an op, and what becomes of them where a step is not as expected.

    ON_DEMAND --(a step ended that is worth a plan)--> PLANNED
    PLANNED   --(plans are given up)-----------------> ON_DEMAND

In PLANNED each op starts the moves that the plan triggers there. Of a step that differs, only what differs is fetched
on demand: ops that the plan does not have, and what it has not brought in time. Where the ops are those of another kind
of step that has a plan, the step goes on by that one. A plan is made anew with the times of steps that followed it.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Iterable
from typing import Final

from pagemem.errors import BudgetError
from pagemem.frames.page import FrameId, TensorId
from pagemem.residency.paged_tensor import PagedTensor
from pagemem.telemetry.events import Event, EventKind, EventSink
from scheduler.execution.plan_book import PlanBook, PlannedStep, Signature
from scheduler.execution.planned_moves import PlannedMoves
from scheduler.execution.rest import Rest
from scheduler.execution.step_planner import StepPlanner
from scheduler.lookahead.next_uses import NEVER
from scheduler.planning.cursor import Advance, Cursor
from scheduler.planning.durations import Durations
from scheduler.planning.plan import Plan
from scheduler.planning.trace import OpKey, OpKind, Trace, TraceRecorder
from scheduler.tiers.memories import Memories


class Mode(enum.Enum):
    """How ops get their tensors; see the diagram at the top of this module."""

    ON_DEMAND = "on demand"
    PLANNED = "planned"


_BLANK: Final = Trace(())


class PlanFollower:
    """Makes and follows plans. Training thread only, with the movers' locks held.

    Args:
        memories: of all tiers; a device may be added before the first op.
        recorder: the ops of the step under way.
        planner: makes plans.
        sink: takes deviations.

    Attributes:
        planned_steps: that followed a plan, wholly or but for what differed. deviations: those of them that differed
            from every plan.
        plans_made: new ones, and those made anew with better times.
        differs: the step under way does.
        rest: whether steps follow a plan that moves nothing, so that ops of its tensors may be left out.
    """

    def __init__(self, memories: Memories, recorder: TraceRecorder, planner: StepPlanner, sink: EventSink) -> None:
        self.planned_steps = self.deviations = self.plans_made = 0
        self.differs = False
        self.rest = Rest(memories.host.mover)
        self._records_whole = True
        self._memories = memories
        self._moves = PlannedMoves(memories)
        self._recorder = recorder
        self._planner = planner
        self._sink = sink
        self._book = PlanBook()
        self._cursor = Cursor()
        self._entry: PlannedStep | None = None
        self._paused: PlannedStep | None = None
        self._leaves = False  # the next step is expected to follow another plan
        self._at: int | None = None  # place in the plan of the op under way; None: it is not the plan's
        self._announced: set[TensorId] = set()

    # ---- the present plan --------------------------------------------------------------------------------------

    @property
    def mode(self) -> Mode:
        """How ops get their tensors."""
        return Mode.ON_DEMAND if self._entry is None else Mode.PLANNED

    @property
    def planned(self) -> bool:
        """Whether there is a plan for the step under way."""
        return self._entry is not None

    @property
    def moves(self) -> bool:
        """Whether it is followed op by op."""
        return self._entry is not None and not self.rest.active

    @property
    def plan(self) -> Plan | None:
        """The present plan, if there is one, or the one that was followed before a `pause`."""
        known = self._entry or self._paused
        return None if known is None else known.plan

    @property
    def trace(self) -> Trace:
        """The step that the plan was made for, with the durations it was made with; empty without a plan."""
        known = self._entry or self._paused
        return _BLANK if known is None else known.trace

    @property
    def durations(self) -> Durations:
        """Of the ops of steps that followed the plan; once complete, it was made with them."""
        known = self._entry or self._paused
        return Durations() if known is None else known.durations

    @property
    def wants_times(self) -> bool:
        """Whether somebody wants to know how long the ops of the step under way take."""
        return self._entry is None or self.differs or self._entry.durations.wanted

    def frame_for(self, tensor: TensorId) -> FrameId | None:
        """Where the plan has a tensor of the op under way; None: it does not have the op."""
        return None if self._at is None else self._moves.frames.get(tensor)

    def next_use(self, tensor: TensorId) -> int:
        """Ops until the plan uses what a tensor holds, at least; `NEVER` where it does not."""
        if tensor in self._announced or self._memories.is_to_be_copied(tensor):
            return 0
        return NEVER if self._entry is None else self._entry.uses.distance(tensor, self._cursor.position)

    # ---- ops ---------------------------------------------------------------------------------------------------

    def goes_on(self, key: OpKey | None) -> bool:
        """Whether the next op, or the end of the step (None), is the one expected, and the plan goes on from it: no
        load that was begun is taken back then."""
        entry = self._entry
        if entry is None or self.rest.active:
            return key is not None or self.rest.active
        if key is None:
            return self._cursor.at_end and not (self.differs or self._leaves or self.wants_times)
        return self._moves.placed and self._cursor.expects(entry.plan, key, begins=not self._recorder.ops)

    def follow(self, key: OpKey) -> None:
        """Take the step to ``key`` along its plan, starting what that triggers."""
        entry = self._entry
        self._at = None
        if entry is None:
            return
        if not self._recorder.ops:
            self._begin_step(entry)
        found = self._cursor.advance(entry.plan, key)
        if found is None or found.skipped:
            self._moves.let_leave()
        if found is None or self._passes_over(found.skipped):
            other = self._book.beginning_with(self._recorder.performed, key, entry)
            if other is not None:
                self._enter(other, len(self._recorder.performed))
                self._leaves = self._book.expected_after(other) is not other
                entry, found = other, self._cursor.advance(other.plan, key)
            else:
                self._differ(self._cursor.difference(entry.plan, key, found))
        if found is None:
            return
        self._at = found.position
        if not self._moves.placed:
            self._moves.place(entry, found.position)
        if not self.differs:
            self._assume(entry, found.skipped)
        self._moves.start(entry, found, leaves=self._leaves)

    def _begin_step(self, entry: PlannedStep) -> None:
        if self._cursor.begin_step(entry.plan) and not entry.plan.closed:
            self._moves.placed = False
            self._moves.let_leave()
        self._leaves = self._book.expected_after(entry) is not entry

    def _passes_over(self, skipped: range) -> bool:
        """Whether more than updates is not made, which may have been made elsewhere (`Driver.untraced`)."""
        assert self._entry is not None
        return any(self._entry.plan.keys[position][0] is not OpKind.UPDATE for position in skipped)

    def _assume(self, entry: PlannedStep, updates: range) -> None:
        """Updates are not made in this step; they may be in later ones."""
        for position in updates:
            self._recorder.assume(entry.trace.ops[position % len(entry.trace.ops)])

    def missed(self, name: str, tensor: PagedTensor) -> None:
        """The plan has not brought a tensor of the op under way, which is fetched on demand."""
        if self._moves.is_left_out(tensor.id) or not self._moves.placed:
            self._moves.placed = False  # what leaves for it comes back, but perhaps not for this op
        elif self._entry is not None:
            self._differ(f"{name}: the plan has not brought {tensor.name}")

    def announce(self, tensors: Iterable[TensorId]) -> None:
        """What is used next: it is not made to leave before the next step. See `Driver.announce`."""
        self._announced.update(tensors)

    def _differ(self, why: str) -> None:
        """Count a step that is not as its plan has it, once."""
        if not self.differs:
            self.differs = True
            self.deviations += 1
            self._emit_deviation(why)

    # ---- rest --------------------------------------------------------------------------------------------------

    def resident_tensors(self) -> frozenset[TensorId]:
        """Between two steps: the tensors that the plan never moves, which are where it has them; from now on their ops
        may be left out. None of them where the plan moves some, or is not yet the one that is going to stay."""
        alone = self._memories.device is None and self._planner.ranks is None and len(self._book) == 1
        if alone and not self.rest.active and self._entry is not None and self._moves.placed:
            self.rest.try_begin(self._entry)
        return self.rest.tensors

    def end_rest(self, why: str | None) -> bool:
        """Memory is short: leave the plan if it rests, for the rest of the step; with a reason it counts as a
        deviation. Returns whether it did."""
        if not self.rest.active:
            return False
        assert self._entry is not None
        self._records_whole = False
        self.rest.disturbed(self._entry)
        self.pause()
        if why is not None:
            self.deviations += 1
            self._emit_deviation(why)
        return True

    # ---- steps -------------------------------------------------------------------------------------------------

    def agree(self) -> None:
        """A step ends: have it be the same for all ranks. Without the movers' locks; see `RankAgreement.end_step`."""
        plan = None if self._entry is None else self._entry.plan
        self.differs = self._planner.agree(self._recorder, plan, differs=self.differs, timed=self.wants_times)

    def end_step(self, *, repeatable: bool) -> None:
        """The step under way ends; choose the plan of the next one.

        Where views in use leave the planner no window, steps stay on demand; that is counted and emitted.

        Args:
            repeatable: a plan may be made of it.

        Raises:
            PlanError: the plan does not hold, which is a defect; it is not followed.
        """
        entry = self._entry
        repeatable, self._records_whole = repeatable and self._records_whole, True
        if self.rest.active:
            self._recorder.finish(timed=False)
            self.planned_steps += 1
            return
        if entry is not None:
            entry = self._end_planned_step(entry)
        trace = self._recorder.finish(timed=repeatable and self.wants_times, assumed=not self.differs)
        as_planned = entry is not None and not self.differs
        # What was fetched on demand has taken others' places.
        self._moves.placed &= as_planned
        self.differs, self._at = False, None
        self._announced.clear()
        made = False
        if entry is not None and as_planned:
            made = self._end_step_as_planned(entry, trace)
        elif repeatable and (wanted := self._book.wanted(entry, trace)) is not None:
            made = self._plan_for(*wanted)
        self._expect_next(entry, made)

    def _end_step_as_planned(self, entry: PlannedStep, trace: Trace) -> bool:
        """The step was the plan's; returns whether that is made once more with better times."""
        if not entry.n_steps:
            for memory in self._memories.all:
                memory.mover.tenants.reset_touched()
        entry.n_steps += 1
        refined = entry.durations.add(entry.trace, trace)
        made = refined is not None and self._plan_for(refined, entry.durations)
        self._book.ended(entry.signature)
        return made

    def _expect_next(self, entry: PlannedStep | None, made: bool) -> None:
        """Go on with the plan that the next step is expected to follow, after one by ``entry``."""
        expected = self._book.expected()
        if expected is not None and (made or expected is not entry):
            self._enter(expected)
            if entry is not None and not made:
                self._moves.place(expected, 0)  # what it begins with comes before it does
        elif self._leaves:
            # Loads for the next step were left out, and it goes on by the same plan after all.
            self._moves.placed = False
        self._entry = expected

    def _end_planned_step(self, entry: PlannedStep) -> PlannedStep:
        """End a step that followed a plan; returns the plan that had its ops."""
        missing = self._cursor.end_step()
        self.planned_steps += 1
        if (not self._recorder.ops and entry.plan.keys) or self._passes_over(missing):
            shorter = self._book.of(Signature(tuple(self._recorder.performed)))
            if shorter is not None:
                self._enter(shorter)
                return shorter
            self._differ("the step ended early")
        elif not self.differs:
            self._assume(entry, missing)
        if missing:
            self._moves.start(entry, Advance(missing[-1], missing[:-1]), leaves=self._leaves)
        return entry

    def abandon_step(self) -> None:
        """The step under way is none: the next op is the first one of a step again."""
        self._moves.forget()
        self.differs, self._at = False, None
        if self._entry is not None:
            self._cursor.restart_step(self._entry.plan)

    def disturb(self) -> None:
        """Something other than the plan is about to move tensors: what the plan has is brought back before going on."""
        self._moves.disturb()

    def pause(self) -> None:
        """What is left of this step, or the next one, is fetched on demand. Nobody's deviation."""
        self.rest.end()
        self.disturb()
        self._entry, self._paused = None, self._entry or self._paused

    def invalidate(self) -> None:
        """Give all plans up; nobody's deviation."""
        self.pause()
        self._paused = None
        self._book.clear()

    # ---- inside ------------------------------------------------------------------------------------------------

    def _plan_for(self, trace: Trace, durations: Durations | None = None, joined: bool = False) -> bool:
        """Make a plan and keep it; where there is none, the present one stays. Returns whether there is one."""
        try:
            # Another kind of step may never come again. If it does, there is a better plan once it was measured. One
            # that is joined does not last either, and its steps leave much out.
            plan = self._planner.plan(trace, fast=joined or (durations is None and len(self._book) > 0))
        except BudgetError as error:
            self._emit_deviation(f"no plan: {error}")
            return False
        self.plans_made += 1
        sources = self._planner.sources(trace.tensors())
        self._book.keep(PlannedStep(trace, plan, durations or Durations(), sources, joined=joined))
        return True

    def _enter(self, entry: PlannedStep, position: int = 0) -> None:
        self._entry = entry
        self._cursor.enter(entry.plan, position)
        self._moves.forget()

    def _emit_deviation(self, why: str) -> None:
        self._sink.emit(Event(EventKind.DEVIATION, why, 0, time.perf_counter(), 0.0))
