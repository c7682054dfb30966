"""How long a rehearsed step takes, and what it waits for: its plan over all tiers and lanes, simulated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from offload.forecast.planned import planned
from offload.forecast.rehearsal import Rehearsal
from pagemem.tier import Tier
from scheduler.planning.plan import Plan
from scheduler.planning.task import Lane
from scheduler.simulation.simulator import Simulation, simulate_work

#: The lane of copies from host memory to the device.
H2D: Final = "h2d"


@dataclass(frozen=True, slots=True)
class StepTimes:
    """A step's seconds and moves.

    Attributes:
        step_s: predicted. compute_s: of it, without any wait.
        busy: share of the step that each lane is busy. waits_s: of a step, by the lane that was waited for.
        steady: whether the moves repeat from step to step.
        read_bytes, written_bytes: of the page files, per step; h2d_bytes: copied to the device; comm_bytes: of whole
            units that ranks gather and sum.
    """

    step_s: float
    compute_s: float
    busy: Mapping[str, float]
    waits_s: Mapping[str, float]
    steady: bool
    read_bytes: float
    written_bytes: float
    h2d_bytes: float
    comm_bytes: float = 0.0

    @classmethod
    def of(cls, engine: Rehearsal) -> StepTimes:
        """Of an engine that has rehearsed its steps."""
        found = planned(engine)
        simulated = simulate_work(found.plan, found.work)
        waits_s = _waits_s(found.plan, simulated)
        busy = {lane.value: share for lane, share in simulated.busy.items() if share or lane.value in waits_s}
        busy[Lane.COMPUTE.value] = simulated.busy[Lane.COMPUTE]
        return cls(
            simulated.step_s,
            engine.driver.follower.trace.compute_s,
            busy,
            waits_s,
            simulated.steady,
            simulated.read_bytes,
            simulated.written_bytes,
            simulated.lane_bytes.get(Lane.H2D, 0.0),
            simulated.lane_bytes.get(Lane.COMM, 0.0),
        )

    @property
    def limiting(self) -> str:
        """The lane that is busy most."""
        return max(self.busy, key=lambda lane: self.busy[lane])


def _waits_s(plan: Plan, simulated: Simulation) -> dict[str, float]:
    """Seconds of a step waited, by lane."""
    lanes = [Lane.SSD_READ, Lane.SSD_WRITE]
    lanes += [Lane.H2D] if Tier.DEVICE in plan.frames else []
    lanes += [] if plan.updates is None else [Lane.UPDATE]
    found = {lane.value: 0.0 for lane in lanes}
    for wait in simulated.waits:
        found[wait.lane.value] = found.get(wait.lane.value, 0.0) + wait.seconds / plan.n_steps
    return found
