"""Executes training ops over paged tensors: follows the plan while the step is the traced one, fetches on demand
otherwise.

On demand, each op fetches what it lacks, synchronously, in place of the least recently used tensors, and is recorded;
from the record of a whole step a plan is made. By plan (`scheduler.execution.plan_follower`), the training thread waits
only for what its own op needs; what differs from the plan is fetched on demand. Forward passes that evaluate
(`Driver.evaluating`) repeat like steps and have plans of their own. Ops in `untraced` are fetched on demand and not
recorded.

Everything here runs on the training thread; the copies run on the page files' threads and report to the mover.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

from pagemem.frames.page import TensorId
from pagemem.process.closing import close_all
from pagemem.residency.mover import Mover
from pagemem.residency.paged_tensor import PagedTensor, Residency
from pagemem.telemetry.events import EventSink
from pagemem.telemetry.recorder import Recorder, WaitCause
from scheduler.execution.lower_tier import LowerTier
from scheduler.execution.on_demand import OnDemand
from scheduler.execution.pinning import Bringer, Pinner
from scheduler.execution.plan_follower import Mode, PlanFollower
from scheduler.execution.read_ahead import ReadAhead
from scheduler.execution.read_lane import ReadLane
from scheduler.execution.tier_planner import TierPlanner
from scheduler.execution.tracks import Track, Tracks
from scheduler.execution.wait_explainer import WaitExplainer
from scheduler.planning.trace import Access, AccessMode, Clock, OpKey, TraceRecorder


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
        tracks: the ops and the plans of steps, and of passes.
        bringer: counts the bytes that no plan brought.
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
        # What is above another tier is a copy away: loads there begin once the tier below has the tensor.
        self._read_ahead = ReadAhead(mover) if lower is None else None
        self._on_demand = OnDemand(mover, (lambda: None) if lower is None else lower.cancel_loads, self._read_ahead)
        self.bringer = Bringer(mover, self._lane, self._on_demand, lower, self._followed)
        self._pinner = Pinner(mover, self._on_demand, self.bringer.bring, self._lane, lower)
        self.tracks = Tracks(mover, self._lane, self.planner, sink, clock, lower)
        self._on_demand.make_way = self._make_way
        self._unsettled_steps = 0
        self._recording = True
        self._n_passes = 0

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
    def follower(self) -> PlanFollower:
        """The plans of steps."""
        return self.tracks.steps.follower

    @property
    def _track(self) -> Track:
        return self.tracks.passes if self._n_passes else self.tracks.steps

    @property
    def _recorder(self) -> TraceRecorder:
        return self._track.recorder

    @property
    def position(self) -> int:
        """Ops of the step under way so far."""
        return len(self.tracks.steps.recorder.ops)

    @property
    def in_step(self) -> bool:
        """Whether ops are part of a step, not of a pass or an `untraced`."""
        return self._recording and not self._n_passes

    @property
    def in_pass(self) -> bool:
        """Whether a pass is under way."""
        return self._n_passes > 0

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
        watcher, track = self.watcher, self._track
        follows = self._recording and not self.follower.rest.active
        if self._lower is not None:
            self._lower.op_begins(key[0])
        if self._recording:
            track.recorder.pause()
        if watcher is not None:
            watcher.ends()
        with self.mover.changed:
            self.mover.monitor.check()
            self._collect_views()
            if follows:
                self.tracks.go_to(track)
                track.follower.follow(key)
                track.recorder.begin(key, name, accesses)
            if self._read_ahead is not None:
                # Of a plan that rests, uses are not seen, and nothing leaves without its being told.
                self._read_ahead.op_begins((access.tensor for access in accesses), pauses=self.follower.rest.active)
            held = self._pinner.pin(name, [access for access in accesses if access.mode is not AccessMode.RENEW])
        if watcher is not None:
            watcher.begins(key[0].value, name, held[0].name if held else "", sum(tensor.n_bytes for tensor in held))
        # A plan that is to stay needs no times, and a device takes two events for each.
        if follows and track.follower.wants_times:
            track.recorder.go_on()
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

    def announce(self, tensors: Sequence[TensorId]) -> None:
        """Have tensors brought in that the next ops use, in this order, as is known only now: the experts that a gate
        has chosen. Does not wait; those without room beside each other are fetched by their ops.

        Training thread, between two ops.
        """
        self.bringer.announce(tensors)

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
        replanned_above = self.above is not None and self.above._end_step_above(repeatable=repeatable)
        with self.mover.changed:
            self._collect_views()
            self.on_demand_steps += self.follower.mode is Mode.ON_DEMAND
            # A step may ask nothing of this tier, where all it needs is resident above.
            asked = self._recorder.ops or (self.above is not None and self.above.follower.plan is not None)
            self.follower.end_step(repeatable=repeatable and not replanned_above and bool(asked))
            if replanned_above:
                self.follower.pause()

    def _end_step_above(self, *, repeatable: bool) -> bool:
        """End the step of a tier above; returns whether it has another plan now, so that it asks for other things."""
        self._recorder.pause()
        with self.mover.changed:
            self._collect_views()
            self.on_demand_steps += self.follower.mode is Mode.ON_DEMAND
            return self.follower.end_step(repeatable=repeatable and bool(self._recorder.ops))

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
            self.tracks.both(PlanFollower.invalidate)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """A forward pass of the whole model that evaluates: ops inside are those of a pass, not of a step. A pass that
        comes again is planned."""
        with nullcontext() if self._lower is None else self._lower.evaluating():
            if self._recording and not self._n_passes:
                self._recorder.pause()
            self._n_passes += 1
            try:
                yield
            finally:
                self._recorder.pause()
                with self.mover.changed:
                    self._collect_views()
                    if self._n_passes == 1 and self._recorder.ops:
                        self._track.follower.end_step(repeatable=True)
                self._n_passes -= 1

    @contextmanager
    def untraced(self) -> Iterator[None]:
        """Ops inside are not part of a step, here and below: they are fetched on demand and not recorded."""
        with nullcontext() if self._lower is None else self._lower.untraced():
            recording, computing = self._recording, self._recorder.computing
            if recording:
                self._recorder.pause()
                self.tracks.active.follower.disturb()
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
            *([] if self._lower is None else [self._collect_views]),
            *([] if self.above is None else [self.above.quiesce]),
            self.follower.rest.let_go,
            partial(self.tracks.both, PlanFollower.disturb),
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

    def _collect_views(self) -> None:
        with self.mover.changed:
            for tensor in self.mover.collect_leases():
                if self._recording:
                    self._recorder.views_ended(tensor.id)
        if self._lower is not None:
            self._lower.write_back_edited()

    def _followed(self) -> PlanFollower | None:
        return self._track.follower if self._recording else None

    def _make_way(self) -> bool:
        return self.follower.end_rest("no room beside a plan that moves nothing" if self._recording else None)
