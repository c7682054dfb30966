"""How long a rehearsed step takes, and what it waits for: its plan over all tiers and lanes, simulated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from offload.forecast.late_updates import LateSteps
from offload.forecast.planned import planned
from offload.forecast.rehearsal import Rehearsal
from pagemem.tier import Tier
from scheduler.execution.driver import Driver
from scheduler.planning.simulator import Simulation, simulate_work
from scheduler.planning.task import Lane

#: The lane of copies from host memory to the device.
H2D: Final = "h2d"
#: What lock-free steps wait for, beside pages.
UPDATES: Final = "updates"


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
        driver = engine.driver
        simulated, compute_s = _simulated(engine), driver.follower.trace.compute_s
        waits_s = _waits_s(driver, simulated)
        busy = {lane.value: share for lane, share in simulated.busy.items() if share or lane.value in waits_s}
        busy[Lane.COMPUTE.value] = simulated.busy[Lane.COMPUTE]
        step_s, moved = simulated.step_s, (simulated.read_bytes, simulated.written_bytes)
        if late is not None:
            # What the training thread's own plan waits for comes on top: the disk serves it first.
            busy_s = {lane: share * step_s for lane, share in busy.items()}
            step_s = late.step_s + sum(waits_s.values())
            waits_s[UPDATES] = late.wait_s
            moved = moved[0] + late.read_bytes, moved[1] + late.written_bytes
            for lane, share in late.busy.items():
                busy_s[lane] = busy_s.get(lane, 0.0) + share * late.step_s
            busy = {lane: seconds / step_s if step_s else 0.0 for lane, seconds in busy_s.items()}
        h2d_bytes = simulated.lane_bytes.get(Lane.H2D, 0.0)
        return cls(step_s, compute_s, busy, waits_s, simulated.steady, *moved, h2d_bytes)

    @property
    def limiting(self) -> str:
        """The lane that is busy most."""
        return max(self.busy, key=lambda lane: self.busy[lane])


def _simulated(engine: Rehearsal) -> Simulation:
    found = planned(engine)
    return simulate_work(found.plan, found.work)


def _waits_s(driver: Driver, simulated: Simulation) -> dict[str, float]:
    """Seconds of a step waited, by lane."""
    assert driver.follower.plan is not None
    lanes = [Lane.SSD_READ, Lane.SSD_WRITE, *([Lane.H2D] if Tier.DEVICE in driver.follower.plan.frames else [])]
    found = {lane.value: 0.0 for lane in lanes}
    for wait in simulated.waits:
        found[wait.lane.value] = found.get(wait.lane.value, 0.0) + wait.seconds / driver.follower.plan.n_steps
    return found
