"""Executes training ops over paged tensors: follows the plan while the step is the traced one, fetches on demand
otherwise.

On demand, each op fetches what it lacks, synchronously, in place of the least recently used tensors, and is recorded;
from the record of a whole step a plan is made. By plan (`scheduler.execution.plan_follower`), the training thread waits
only for what its own op needs. A step that differs from its trace is still executed correctly. Ops in `untraced`
(evaluation between steps) are fetched on demand and not recorded.

Everything here runs on the training thread; the copies run on the page files' threads and report to the mover.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

from pagemem.process.closing import close_all
from pagemem.residency.mover import Mover
from pagemem.residency.paged_tensor import PagedTensor, Residency
from pagemem.telemetry.events import EventSink
from pagemem.telemetry.recorder import Recorder, WaitCause
from scheduler.execution.lower_tier import LowerTier
from scheduler.execution.on_demand import OnDemand
from scheduler.execution.pinning import Pinner, is_usable
from scheduler.execution.plan_follower import Mode, PlanFollower
from scheduler.execution.read_ahead import ReadAhead
from scheduler.execution.read_lane import ReadLane
from scheduler.execution.tier_planner import TierPlanner
from scheduler.execution.wait_explainer import WaitExplainer
from scheduler.planning.trace import CHANGES, Access, AccessMode, Clock, HostClock, OpKey, TraceRecorder


class Driver:
    """Gives the training thread its tensors, op by op.

    Args:
        mover: owner of all residency in the tier.
        sink: takes waits and deviations.
        bandwidth: current bandwidths (read, write) of what is below in bytes/s, asked for when a plan is made.
        clock: times ops; None: the training thread's own.
        lower: the tier that tensors are copied up from; None above page files. With one, every planned step has the
            same moves, so that what is asked for below is the same in each.

    Attributes:
        watcher: is told of ops and steps, while somebody profiles.
        above: the driver of the tier above, whose steps end when this one's do.
        planner: makes plans for this tier.
        follower: has the present plan, and says how ops get their tensors.
    """

    def __init__(
        self,
        mover: Mover,
        sink: EventSink,
        bandwidth: Callable[[], tuple[float, float]],
        clock: Clock | None = None,
        lower: LowerTier | None = None,
    ) -> None:
        self.mover = mover
        self.on_demand_steps = 0
        self.watcher: Recorder | None = None
        self.above: Driver | None = None
        self.planner = TierPlanner(mover, bandwidth, single_step_cycle=lower is not None)
        self._lower = lower
        self._lane = ReadLane(mover)
        self._recorder = TraceRecorder(clock or HostClock())
        # What is above another tier is a copy away: loads there begin once the tier below has the tensor.
        self._read_ahead = ReadAhead(mover) if lower is None else None
        self._on_demand = OnDemand(mover, self._read_ahead)
        bring = self._bring if lower is None else self._bring_from_below
        self._pinner = Pinner(mover, self._on_demand, bring, self._lane, lower)
        self.follower = PlanFollower(mover, self._lane, self._recorder, self.planner, sink, lower)
        self._on_demand.make_way = self._make_way
        self._unsettled_steps = 0
        self._recording = True

    def put_above(self, driver: Driver) -> None:
        """Have the steps of a driver whose tensors are copied up from here end with this one's."""
        self.above = driver

    def set_order(self, tensors: Iterable[PagedTensor]) -> None:
        """In which order passes go through tensors, where these are brought here from page files: what is fetched on
        demand is read ahead in it, or backwards."""
        if self._read_ahead is not None:
            self._read_ahead.set_order(tensors)

    def set_overhead(self, n_bytes: int) -> None:
        """What the budget holds beside the arena from now on."""
        self._on_demand.overhead_bytes = n_bytes

    @property
    def overhead_bytes(self) -> int:
        """What the budget holds beside the arena."""
        return self._on_demand.overhead_bytes

    @property
    def position(self) -> int:
        """Ops of the step under way so far."""
        return len(self._recorder.ops)

    @property
    def in_step(self) -> bool:
        """Whether ops are part of a step, not of an `untraced`."""
        return self._recording

    # ---- ops ---------------------------------------------------------------------------------------------------

    @contextmanager
    def op(self, key: OpKey, name: str, accesses: Sequence[Access]) -> Iterator[None]:
        """One op: its tensors are in the tier's memory and do not move inside the block.

        Raises:
            BudgetError: they do not fit together with what is held; nothing was lost.
            StorageError: a page file failed; every tensor is intact where it was.
            DeviceError: the calling thread's compute goes where copies are not ordered with it.
        """
        held = self.begin(key, name, accesses)
        try:
            yield
        finally:
            self.end(held)

    def begin(self, key: OpKey, name: str, accesses: Sequence[Access]) -> list[PagedTensor]:
        """Begin an op, see `op`; returns what `end` must be given."""
        watcher = self.watcher
        if self._lower is not None:
            self._lower.op_begins(key[0])
        if self._recording:
            self._recorder.pause()
        if watcher is not None:
            watcher.ends()
        with self.mover.changed:
            self.mover.monitor.check()
            self._collect_views()
            if self._recording and (self.follower.mode is Mode.ON_DEMAND or self.follower.follow(key)):
                self._recorder.begin(key, name, accesses)
            if self._read_ahead is not None:
                # Of a plan that rests, uses are not seen, and nothing leaves without its being told.
                self._read_ahead.op_begins((access.tensor for access in accesses), pauses=self.follower.rests)
            held = self._pinner.pin(name, [access for access in accesses if access.mode is not AccessMode.RENEW])
        if watcher is not None:
            watcher.begins(key[0].value, name, held[0].name if held else "", sum(tensor.n_bytes for tensor in held))
        # A plan that is to stay needs no times, and a device takes two events for each.
        if self._recording and (self.follower.mode is Mode.ON_DEMAND or self.follower.durations.wanted):
            self._recorder.go_on()
        return held

    def end(self, held: Sequence[PagedTensor]) -> None:
        """End an op: its tensors may move again, unless views of them live on. What was edited above another tier is
        written back.

        Raises:
            StorageError: it cannot be: a page file failed. The tier still has it.
        """
        with self.mover.changed:
            self._pinner.unpin(held)
        if self._lower is not None:
            self._lower.write_back_edited()

    @contextmanager
    def in_passing(self, tensor: PagedTensor) -> Iterator[bool]:
        """Without an op and without moves: yields whether a tensor is in memory and may be changed in the block."""
        with self.mover.changed:
            free = tensor.readable and not tensor.snapshot_pending and not tensor.uploads
            if free:
                tensor.pins += 1
                self.mover.touch(tensor)
        try:
            yield free
        finally:
            if free:
                self.end([tensor])

    def viewed(self, tensor: PagedTensor, *, beside: int = 0) -> bool:
        """Whether somebody has a view of a tensor, ``beside`` as many as are known."""
        if tensor.leases <= beside:
            return False
        with self.mover.changed:
            self._collect_views()
            return tensor.leases > beside

    def consume(self, tensor: PagedTensor) -> None:
        """Declare a tensor's content dead, after the op that consumed it has ended."""
        self.mover.monitor.wait_until(lambda: not tensor.moving, tensor.name, tensor.n_bytes)
        self.mover.discard(tensor)

    # ---- steps -------------------------------------------------------------------------------------------------

    def end_step(self, *, repeatable: bool) -> None:
        """The optimizer step is made: the ops since the last call are one step.

        Args:
            repeatable: whether the next step is expected to have the same ops (not so for a first step).
        """
        self._recorder.pause()
        if self.watcher is not None and self._lower is None:  # one driver tells of steps, not each
            self.watcher.step_ends()
        if self._unsettled_steps:
            self._unsettled_steps -= 1
            repeatable = False
        replanned_above = self.above is not None and self._end_step_above(self.above, repeatable=repeatable)
        with self.mover.changed:
            self._collect_views()
            repeatable = repeatable and self.follower.records_whole
            if self.follower.end_planned_step():
                if replanned_above:
                    self.follower.leave(None)
                return
            self.on_demand_steps += 1
            trace = self._recorder.finish(timed=repeatable)
            if repeatable:
                trace.take_durations(self.follower.trace)  # of ops that followed the plan before this step left it
            # A step may ask nothing of this tier, where all it needs is resident above.
            asked = trace.ops or (self.above is not None and self.above.follower.plan is not None)
            if repeatable and not replanned_above and asked:
                self.follower.adopt(trace)

    def _end_step_above(self, above: Driver, *, repeatable: bool) -> bool:
        """End the step of the tier above; returns whether it has another plan now, so that it asks for other things."""
        plan = above.follower.plan
        above.end_step(repeatable=repeatable)
        return above.follower.plan is not plan

    def abandon_step(self) -> None:
        """Forget the ops since the last step's end. The next op is the first one of a step again."""
        if self.above is not None:
            self.above.abandon_step()
        if self.watcher is not None:
            self.watcher.ends()
        with self.mover.changed:
            self._collect_views()
            if self._recorder.ops:
                self._recorder.finish(timed=False)
                self.follower.abandon_step()

    def invalidate_plan(self, steps: int) -> None:
        """Between two steps: the next ones have other ops. The first ``steps`` of them do not repeat yet; they are
        fetched on demand, then there is a new plan. That counts as no deviation."""
        if self.above is not None:
            self.above.invalidate_plan(steps)
        with self.mover.changed:
            self._unsettled_steps = steps
            self.follower.invalidate()

    @contextmanager
    def untraced(self) -> Iterator[None]:
        """Ops inside are not part of a step, here and below: they are fetched on demand and not recorded."""
        with nullcontext() if self._lower is None else self._lower.untraced():
            recording, computing = self._recording, self._recorder.computing
            if recording:
                self._recorder.pause()
                self.follower.disturb()
            self._recording = False
            try:
                yield
            finally:
                self._recording = recording
                if recording and computing:
                    self._recorder.go_on()

    def quiesce(self) -> None:
        """Stop reading ahead and wait until no copy is under way, also after an error, and where the tier above fails
        in that. What was edited until now above another tier is written back."""
        close_all(
            *([] if self._lower is None else [self._collect_views_locked]),
            *([] if self.above is None else [self.above.quiesce]),
            self.follower.let_go,
            self.follower.disturb,
            self.mover.monitor.settle,
        )

    def evict_all(self) -> None:
        """Store what is dirty and give all host frames up.

        Raises:
            AssertionError: something is held. StorageError: a copy failed; it is still intact in host memory.
        """
        self.quiesce()
        self._collect_views()
        self.mover.store_all()
        for tensor in self.mover.tensors.values():
            if tensor.state is Residency.CLEAN and not tensor.resident:
                self.mover.drop(tensor)

    def causes(self) -> Callable[[str], WaitCause]:
        """Explains waits, for the profiler."""
        return WaitExplainer(self.mover, self._lane) if self._lower is None else self._lower.causes()

    # ---- inside ------------------------------------------------------------------------------------------------

    def _collect_views_locked(self) -> None:
        with self.mover.changed:
            self._collect_views()

    def _collect_views(self) -> None:
        for tensor in self.mover.collect_leases():
            if self._recording:
                self._recorder.views_ended(tensor.id)
        if self._lower is not None:
            self._lower.write_back_edited()

    def _make_way(self) -> bool:
        return self.follower.end_rest("no room beside a plan that moves nothing" if self._recording else None)

    def _bring_from_below(self, tensor: PagedTensor, mode: AccessMode, name: str) -> None:
        lower = self._lower
        assert lower is not None
        if lower.must_be_op_below(tensor) or not is_usable(tensor, mode) or tensor.id in self._lane:
            with lower.holds([tensor.id], name):
                self._bring(tensor, mode, name)
            lower.copied([tensor])

    def _bring(self, tensor: PagedTensor, mode: AccessMode, name: str) -> None:
        planned = self.follower.mode is Mode.PLANNED and self._recording
        if self._read_ahead is not None and not planned and tensor.frame is not None and mode is not AccessMode.CREATE:
            self._read_ahead.follow(tensor)
        # Outside a step nobody says whether a tensor is going to be changed.
        if tensor.snapshot_pending and (mode in CHANGES or not self._recording):
            self.mover.make_writable(tensor)

        def usable() -> bool:
            # A tensor that waits in the lane is about to move to where the plan has it, out of another one's way.
            return is_usable(tensor, mode) and tensor.id not in self._lane

        def hopeless() -> bool:
            if tensor.moving:
                return False
            return self._lane.stuck or tensor.id not in self._lane

        self.mover.monitor.wait_until(lambda: usable() or hopeless(), tensor.name, tensor.n_bytes)
        if usable():
            return
        if planned and not self.follower.rests:
            self.follower.leave(f"{name}: the plan has not brought {tensor.name}")
        if not is_usable(tensor, mode):
            self._on_demand.fetch(tensor, name, fresh=mode is AccessMode.CREATE)
