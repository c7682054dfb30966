"""The two things that repeat: training steps, and forward passes that evaluate. Each has ops, a trace and plans of its
own; both use the same lanes, one at a time."""

from __future__ import annotations

from collections.abc import Callable

from pagemem.telemetry.events import EventSink
from pagemem.tier import Tier
from scheduler.execution.plan_follower import PlanFollower
from scheduler.execution.step_planner import StepPlanner
from scheduler.planning.trace import Clock, TraceRecorder
from scheduler.tiers.memories import Memories


class Track:
    """What repeats, as recorded and as planned. Training thread only.

    Attributes:
        recorder: the ops under way. follower: plans for them.
    """

    def __init__(self, recorder: TraceRecorder, follower: PlanFollower) -> None:
        self.recorder = recorder
        self.follower = follower


class Tracks:
    """Steps and passes, and which of the two compute is in.

    Args:
        clocks: time the ops of each tier; may grow before the first op. For others see `PlanFollower`.

    Attributes:
        steps, passes: the two. active: the one that the last op was of.
    """

    def __init__(
        self,
        memories: Memories,
        planner: StepPlanner,
        sink: EventSink,
        clocks: dict[Tier, Clock],
    ) -> None:
        def make() -> Track:
            recorder = TraceRecorder(clocks)
            return Track(recorder, PlanFollower(memories, recorder, planner, sink))

        self._memories = memories
        self.steps, self.passes = make(), make()
        self.active = self.steps

    def go_to(self, track: Track) -> None:
        """Have the next op be one of ``track``."""
        if track is not self.active:
            self.active.follower.disturb()
            self.active = track

    def both(self, do: Callable[[PlanFollower], None]) -> None:
        """Do something to the plans of both."""
        with self._memories.locked():
            for track in (self.steps, self.passes):
                do(track.follower)
