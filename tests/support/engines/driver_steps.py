"""Steps for tests of the driver."""

from __future__ import annotations

from training_rig import Rig

from scheduler.execution.plan_follower import Mode

#: Forward, backward, and updates with a gradient that is made and consumed, over five tensors.
STEP = ("Ar", "Br", "Cr", "Cr Ec", "Ew Br", "Ar Ex", "u: Aw", "u: Bw Dw", "u: Cw")
PLAIN = ("Ar", "Br", "Cr", "Dw", "Bw", "Aw")


def planned(of: Rig, *ops: str) -> None:
    """Bring a rig to where it follows a plan for these ops."""
    of.step(*ops)
    of.step(*ops)
    follower = of.driver.follower
    assert (follower.mode, follower.planned_steps, follower.deviations) == (Mode.PLANNED, 1, 0)
