"""How long a rehearsed step takes, and what it waits for: the plans of its tiers, simulated.

With a device there are two plans, one above the other, and each is simulated by itself: the upper one as if everything
were in host memory, the lower one as if the device had its copies at once. A step takes what it computes and the waits
of both. What it computes is between the ops of the upper one: there may be none of the lower one until far into the
step, or at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from offload.forecast.late_updates import LateSteps
from offload.forecast.planned_tiers import planned_tiers
from offload.forecast.rehearsal import Rehearsal
from scheduler.execution.driver import Driver
from scheduler.planning.simulator import Simulation, simulate_work
from scheduler.planning.task import Lane

#: The lane of copies from host memory to the device.
H2D: Final = "h2d"
#: What lock-free steps wait for, beside pages.
UPDATES: Final = "updates"
#: Of the simulator's lanes, those of host memory.
_HOST: Final = (Lane.COMPUTE, Lane.SSD_READ, Lane.SSD_WRITE)
#: And what copies up are to the upper plan.
_UP: Final = Lane.SSD_READ


@dataclass(frozen=True, slots=True)
class StepTimes:
    """A step's seconds and moves.

    Attributes:
        step_s: predicted. compute_s: of it, without any wait.
        busy: share of the step that each lane is busy. waits_s: of a step, by the lane that was waited for.
        steady: whether the moves repeat from step to step.
        read_bytes, written_bytes: of the page files, per step; h2d_bytes: copied to the device.
    """

    step_s: float
    compute_s: float
    busy: Mapping[str, float]
    waits_s: Mapping[str, float]
    steady: bool
    read_bytes: float
    written_bytes: float
    h2d_bytes: float

    @classmethod
    def of(cls, engine: Rehearsal, late: LateSteps | None = None) -> StepTimes:
        """Of an engine that has rehearsed its steps.

        Args:
            late: of its update thread beside what it computes, in lock-free mode.
        """
        host, upper = engine.host, engine.upper
        tiers = planned_tiers(engine)
        below = simulate_work(tiers[0].plan, tiers[0].work)
        waits_s, busy = _waits_s(host, below), {lane.value: below.busy[lane] for lane in _HOST}
        moved = below.read_bytes, below.written_bytes
        if late is not None:
            # What the training thread's own plan waits for comes on top: the disk serves it first.
            step_s = late.step_s + sum(waits_s.values())
            waits_s[UPDATES] = late.wait_s
            moved = moved[0] + late.read_bytes, moved[1] + late.written_bytes
            busy_s = {lane: share * below.step_s for lane, share in busy.items()}
            for lane, share in late.busy.items():
                busy_s[lane] = busy_s.get(lane, 0.0) + share * late.step_s
            busy = {lane: seconds / step_s if step_s else 0.0 for lane, seconds in busy_s.items()}
            return cls(step_s, host.follower.trace.compute_s, busy, waits_s, below.steady, *moved, 0.0)
        if upper is None:
            return cls(below.step_s, host.follower.trace.compute_s, busy, waits_s, below.steady, *moved, 0.0)
        above = simulate_work(tiers[1].plan, tiers[1].work)
        waits_s[H2D] = sum(_waits_s(upper, above).values())
        compute_s = upper.follower.trace.compute_s
        step_s = compute_s + sum(waits_s.values())
        busy = {lane: share * below.step_s / step_s for lane, share in busy.items()}
        busy[H2D] = above.busy[_UP] * above.step_s / step_s
        return cls(step_s, compute_s, busy, waits_s, below.steady and above.steady, *moved, above.read_bytes)

    @property
    def limiting(self) -> str:
        """The lane that is busy most."""
        return max(self.busy, key=lambda lane: self.busy[lane])


def _waits_s(driver: Driver, simulated: Simulation) -> dict[str, float]:
    """Seconds of a step waited, by lane."""
    assert driver.follower.plan is not None
    found = {Lane.SSD_READ.value: 0.0, Lane.SSD_WRITE.value: 0.0}
    for wait in simulated.waits:
        found[wait.lane.value] += wait.seconds / driver.follower.plan.n_steps
    return found
