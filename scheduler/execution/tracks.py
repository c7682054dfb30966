"""The two things that repeat: training steps, and forward passes that evaluate. Each has ops, a trace and plans of its
own; both use the lanes of one tier, one at a time."""

from __future__ import annotations

from collections.abc import Callable

from pagemem.residency.mover import Mover
from pagemem.telemetry.events import EventSink
from scheduler.execution.lower_tier import LowerTier
from scheduler.execution.plan_follower import PlanFollower
from scheduler.execution.read_lane import ReadLane
from scheduler.execution.tier_planner import TierPlanner
from scheduler.planning.trace import Clock, HostClock, TraceRecorder


class Track:
    """What repeats, as recorded and as planned. Training thread only.

    Attributes:
        recorder: the ops under way. follower: plans for them.
    """

    def __init__(self, recorder: TraceRecorder, follower: PlanFollower) -> None:
        self.recorder = recorder
        self.follower = follower


class Tracks:
    """Steps and passes of one tier, and which of the two compute is in.

    Args:
        clock: times ops; None: the training thread's own. For others see `PlanFollower`.

    Attributes:
        steps, passes: the two. active: the one that the last op was of.
    """

    def __init__(
        self,
        mover: Mover,
        lane: ReadLane,
        planner: TierPlanner,
        sink: EventSink,
        clock: Clock | None,
        lower: LowerTier | None,
    ) -> None:
        def make() -> Track:
            recorder = TraceRecorder(clock or HostClock())
            return Track(recorder, PlanFollower(mover, lane, recorder, planner, sink, lower))

        self.steps, self.passes = make(), make()
        self.active = self.steps

    def go_to(self, track: Track) -> None:
        """Have the next op be one of ``track``."""
        if track is not self.active:
            self.active.follower.disturb()
            self.active = track

    def both(self, do: Callable[[PlanFollower], None]) -> None:
        """Do something to the plans of both."""
        for track in (self.steps, self.passes):
            do(track.follower)
