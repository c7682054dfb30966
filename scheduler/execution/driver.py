"""Executes training ops over paged tensors: follows the plan while the step is the traced one, fetches on demand
otherwise.

On demand, each op fetches what it lacks, synchronously, in place of the least recently used tensors, and is recorded;
from the record of a whole step a plan is made. By plan (`scheduler.execution.plan_follower`), the training thread waits
only for what its own op needs. Forward passes that evaluate (`Driver.evaluating`) repeat like steps and have plans of
their own. Ops in `untraced` are fetched on demand and not recorded.

Ops of a device are timed by the device's own clock: the training thread is ahead of it. Updates and gradients that are
made in host memory are beside them. All runs on the training thread; a device's lock is taken before the host's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from pagemem.frames.page import TensorId
from pagemem.process.closing import close_all
from pagemem.ranks.comm_lane import CommLane
from pagemem.residency.device_mover import DeviceMover
from pagemem.residency.mover import Mover
from pagemem.residency.paged_tensor import PagedTensor
from pagemem.telemetry.events import EventSink
from pagemem.telemetry.recorder import Recorder
from pagemem.tier import Tier
from scheduler.execution.agreement import RankAgreement
from scheduler.execution.edits_above import EditsAbove
from scheduler.execution.plan_follower import Mode, PlanFollower
from scheduler.execution.step_planner import Bandwidth, StepPlanner
from scheduler.execution.tracks import Track, Tracks
from scheduler.execution.update_ops import Entered, UpdateOps
from scheduler.planning.task import Lane
from scheduler.planning.trace import Access, Clock, HostClock, Op, OpKey, OpKind, TraceRecorder
from scheduler.tiers.memories import Memories, touching

_BESIDE = frozenset({OpKind.UPDATE, OpKind.GRADIENT})  # the compute of a device, where they are in host memory


class Driver:
    """Gives the training thread its tensors, op by op.

    Args:
        mover: owner of residency in host memory.
        sink: takes waits and deviations.
        bandwidth: current bandwidths (read, write) of the page files in bytes/s, asked for when a plan is made.
        clock: times ops in host memory; None: the training thread's own.

    Attributes:
        watcher: is told of ops and steps, while somebody profiles.
        planner: makes plans. memories: of the tiers.
        tracks: the ops and the plans of steps, and of passes.
        updates: ops that are updates.
    """

    def __init__(self, mover: Mover, sink: EventSink, bandwidth: Bandwidth, clock: Clock | None = None) -> None:
        self.mover = mover
        self.on_demand_steps = 0
        self.watcher: Recorder | None = None
        self.planner = StepPlanner(mover, bandwidth)
        self.memories = Memories(mover, lambda: self._track.follower if self._recording else None)
        self.updates = UpdateOps(self)
        self._edits: EditsAbove | None = None
        self._clocks: dict[Tier, Clock] = {Tier.HOST: clock or HostClock()}
        self.tracks = Tracks(self.memories, self.planner, sink, self._clocks)
        short = "no room beside a plan that moves nothing"
        self.memories.host.on_demand.make_way = lambda: self.follower.end_rest(short if self._recording else None)
        self._unsettled_steps = 0
        self._recording = True
        self._n_passes = 0

    def add_device(self, mover: DeviceMover, bandwidth: Bandwidth, clock: Clock) -> None:
        """Have ops use tensors of a device, too, that are copied up from here, and down, at a bandwidth in bytes/s;
        ``clock`` times them. Once, before the first op."""
        self._clocks[Tier.DEVICE] = clock
        self.memories.add_device(mover)
        self._edits = EditsAbove(mover, self)
        self.planner.add(mover, bandwidth)

    def add_ranks(self, lane: CommLane) -> None:
        """Have other ranks, too, which make the same ops. Once, before the first op and after `add_device`."""
        self.memories.add_ranks(lane)
        self.planner.ranks = RankAgreement(lane)

    def mover_of(self, tensor: PagedTensor) -> Mover:
        """The owner of a tensor's residency."""
        return self.memories.of(tensor.id).mover

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
        """One op: its tensors are in their tiers and do not move inside the block.

        Raises:
            BudgetError: they do not fit together with what is held; nothing was lost.
            StorageError, RankError: a page file or another rank failed; every tensor is intact where it was.
            DeviceError: the calling thread's compute goes where copies are not ordered with it.
        """
        held = self.begin(key, name, accesses)
        try:
            yield
        finally:
            self.end(held)

    def begin(self, key: OpKey, name: str, accesses: Sequence[Access]) -> list[PagedTensor]:
        """Begin an op, see `op`; returns what `end` must be given."""
        if self._edits is None:
            accesses, lane, follows = self._prepare(key, accesses)
            with self.mover.changed:
                op = self._go_to(key, name, accesses, lane, follows=follows)
                held = self.memories.host.pinner.pin(name, touching(accesses))
        else:
            accesses, op = self.enter(key, name, accesses)
            held = self.memories.pin(name, accesses)
        self.compute(key, name, held, op)
        return held

    def enter(self, key: OpKey, name: str, accesses: Sequence[Access]) -> Entered:
        """Begin what an op triggers."""
        accesses, lane, follows = self._prepare(key, accesses)
        with self.memories.locked():
            return accesses, self._go_to(key, name, accesses, lane, follows=follows)

    def _prepare(self, key: OpKey, accesses: Sequence[Access]) -> tuple[Sequence[Access], Lane, bool]:
        """Before an op; returns its accesses with their tiers, its lane, and whether it is followed, and recorded."""
        lane = Lane.UPDATE if self.updates.beside and key[0] is OpKind.UPDATE else Lane.COMPUTE
        if self._edits is not None:
            accesses = self.memories.placed(accesses)
            on_device = any(access.tier is Tier.DEVICE for access in accesses)
            if on_device:
                self._edits.check()
            here = on_device or any(access.via for access in accesses)  # what arrives has a lane of its own
            lane = Lane.UPDATE if key[0] in _BESIDE and not here else Lane.COMPUTE
            self.settle_edits()
            self._edits.kind = key[0]
        if self._recording:
            self._recorder.pause()
        if self.watcher is not None:
            self.watcher.ends()
        track, follows = self._track, self._recording and not self.follower.rest.active
        if follows and not (track is self.tracks.active and track.follower.goes_on(key)):
            self.updates.finish()
        return accesses, lane, follows

    def compute(self, key: OpKey, name: str, held: Sequence[PagedTensor], op: Op | None) -> None:
        """The time from now on is that of an op, whose tensors are held; None: it is not recorded."""
        if self.watcher is not None:
            n_bytes = sum(tensor.n_bytes for tensor in held)
            self.watcher.begins(key[0].value, name, held[0].name if held else "", n_bytes)
        # A plan that is to stay needs no times, and a device takes two events for each.
        if op is not None and self._track.follower.wants_times:
            self._recorder.go_on()

    def _go_to(self, key: OpKey, name: str, accesses: Sequence[Access], lane: Lane, *, follows: bool) -> Op | None:
        """Begin what an op triggers, and record it; returns it then. With the locks held."""
        if self._edits is None:
            self._collect_views()
        self.memories.check()
        if follows:
            track = self._track
            self.tracks.go_to(track)
            track.follower.follow(key)
            track.recorder.begin(key, name, accesses, lane)
        if self.memories.host.read_ahead is not None:
            # Of a plan that rests, uses are not seen, and nothing leaves without its being told.
            self.memories.host.read_ahead.op_begins(
                (self.memories.in_host(access.tensor) for access in accesses), pauses=self.follower.rest.active
            )
        return self._recorder.ops[-1] if follows else None

    def end(self, held: Sequence[PagedTensor]) -> None:
        """End an op: its tensors may move again, unless views of them live on. What was edited above another tier is
        written back.

        Raises:
            StorageError: it cannot be: a page file failed. The tier still has it.
        """
        if self._edits is None:
            self.memories.host.pinner.unpin(held)
            return
        self.memories.unpin(held)
        self._edits.write_back()

    def in_passing(self, tensor: PagedTensor) -> AbstractContextManager[bool]:
        """See `Memories.in_passing`."""
        return self.memories.in_passing(tensor)

    def viewed(self, tensor: PagedTensor, *, beside: int = 0) -> bool:
        """Whether somebody has a view of a tensor, ``beside`` as many as are known."""
        if tensor.leases > beside:
            self.settle_edits()
        return tensor.leases > beside

    def announce(self, tensors: Sequence[TensorId]) -> None:
        """Have tensors brought in that the next ops use, in this order, as is known only now: the experts that a gate
        has chosen. Does not wait; those without room beside each other are fetched by their ops. Those of a device come
        to host memory, and are copied up by their ops. Training thread, between two ops.
        """
        self.memories.host.bringer.announce([self.memories.in_host(tensor) for tensor in tensors])

    # ---- steps -------------------------------------------------------------------------------------------------

    def end_step(self, *, repeatable: bool) -> None:
        """The optimizer step is made: the ops since the last call are one step.

        Args:
            repeatable: whether the next step is expected to have the same ops (not so for a first step).
        """
        self._recorder.pause()
        if self.watcher is not None:
            self.watcher.step_ends()
        if not self.follower.goes_on(None):
            self.updates.finish()
        if self._unsettled_steps:
            self._unsettled_steps -= 1
            repeatable = False
        self._agree()
        with self.memories.locked():
            self.on_demand_steps += self.follower.mode is Mode.ON_DEMAND
            self.follower.end_step(repeatable=repeatable and bool(self._recorder.ops))

    def abandon_step(self) -> None:
        """Forget the ops since the last step's end. The next op is the first one of a step again."""
        if self.watcher is not None:
            self.watcher.ends()
        self.updates.finish()
        with self.memories.locked():
            self._collect_views()
            if self._recorder.ops:
                self._recorder.finish(timed=False)
                self.follower.abandon_step()

    def invalidate_plan(self, steps: int) -> None:
        """Between two steps: the next ones have other ops. The first ``steps`` of them do not repeat yet; they are
        fetched on demand, then there is a new plan. That counts as no deviation."""
        self.updates.finish()
        self._unsettled_steps = steps
        self.tracks.both(PlanFollower.invalidate)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """A forward pass of the whole model that evaluates: ops inside are those of a pass, not of a step. A pass that
        comes again is planned."""
        if self._recording and not self._n_passes:
            self._recorder.pause()
        self._n_passes += 1
        try:
            yield
            if self._n_passes == 1:
                self._agree()
        finally:
            self._recorder.pause()
            self.updates.finish()
            with self.memories.locked():
                if self._n_passes == 1 and self._recorder.ops:
                    self._track.follower.end_step(repeatable=True)
            self._n_passes -= 1

    @contextmanager
    def untraced(self) -> Iterator[None]:
        """Ops inside are not part of a step: they are fetched on demand and not recorded."""
        recording, computing = self._recording, self._recorder.computing
        if recording:
            self._recorder.pause()
            self.updates.finish()
            with self.memories.locked():
                self.tracks.active.follower.disturb()
        self._recording = False
        try:
            yield
        finally:
            self._recording = recording
            if recording and computing:
                self._recorder.go_on()

    def quiesce(self) -> None:
        """Stop reading ahead and wait until no copy is under way, also after an error. What was edited until now on a
        device is written back."""
        close_all(
            *([] if self._edits is None else [self.settle_edits]),
            self.follower.rest.let_go,
            self.updates.finish,
            lambda: self.tracks.both(PlanFollower.disturb),
            self.memories.drain,
            self.memories.settle,
        )

    def settle_edits(self) -> None:
        """Have what was edited on a device until now written back.

        Raises:
            StorageError: a page file failed. The device still has it.
        """
        with self.memories.locked():
            self._collect_views()
        if self._edits is not None:
            self._edits.write_back()

    def evict_all(self, tier: Tier = Tier.HOST) -> None:
        """Store what is dirty and give all frames of a tier up.

        Raises:
            AssertionError: something is held. StorageError: a copy failed; it is still intact in memory.
        """
        self.quiesce()
        self.settle_edits()
        self.memories.evict(tier)

    # ---- inside ------------------------------------------------------------------------------------------------

    def _collect_views(self) -> None:
        """Note which views have ended. With the locks held."""
        for tensor in self.memories.collect_views():
            if self._recording:
                self._recorder.views_ended(tensor.id)

    def _agree(self) -> None:
        """A step or pass ends, on all ranks alike. Later ends of views are not this one's."""
        with self.memories.locked():
            self._collect_views()
        self._track.follower.agree()
