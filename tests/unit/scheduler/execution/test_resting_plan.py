"""A plan that moves nothing rests: its ops are not followed, until something has to leave for others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from driver_steps import PLAIN, planned
from training_rig import Rig, rig

from scheduler.execution.plan_follower import Mode
from scheduler.planning.durations import MEASURED_STEPS


@pytest.fixture
def resting() -> Iterator[Rig]:
    """Four tensors at rest in four frames; a fifth one is not used."""
    with rig(4) as r:
        planned(r, *PLAIN)
        assert not r.driver.follower.resident_tensors(), "the plan is going to be made once more"
        for _ in range(MEASURED_STEPS + 1):
            r.step(*PLAIN)
        tensors = r.driver.follower.resident_tensors()
        assert tensors == {r.tensors[letter].id for letter in "ABCD"}
        yield r


def test_steps_at_rest_are_planned_steps_whatever_their_ops(resting: Rig) -> None:
    before = resting.driver.follower.planned_steps
    resting.step(*PLAIN)
    resting.step()
    resting.step("Cr", "Aw", "Cr")
    follower = resting.driver.follower
    assert (follower.planned_steps, follower.deviations, follower.rest.active) == (before + 3, 0, True)
    assert resting.driver.position == 0
    resting.read_all()


def test_where_something_has_to_leave_the_step_leaves_the_plan(resting: Rig) -> None:
    told: list[str] = []
    follower = resting.driver.follower
    follower.rest.let_go = lambda: told.append(resting.resident())
    resting.step("Ar", "Er", "Bw")
    assert told == ["ABCD"], "before anything moved"
    assert (follower.deviations, follower.rest.active, follower.mode) == (1, False, Mode.PLANNED)
    for _ in range(3):
        resting.step(*PLAIN, "Er")
        assert not follower.resident_tensors()
    assert follower.mode is Mode.PLANNED and follower.plan is not None and follower.plan.loads
    resting.read_all()


def test_a_step_of_which_ops_were_left_out_is_no_trace(resting: Rig) -> None:
    follower = resting.driver.follower
    plan, on_demand = follower.plan, resting.driver.on_demand_steps
    resting.step("Er", *PLAIN)
    assert (follower.plan, follower.mode) == (plan, Mode.PLANNED)
    assert resting.driver.on_demand_steps == on_demand + 1
    for rests in (False, True):
        resting.step(*PLAIN)
        assert bool(follower.resident_tensors()) is follower.rest.active is rests, (
            "twice as many steps as before the first"
        )


def test_memory_that_is_short_outside_of_steps_ends_the_rest_and_is_no_deviation(resting: Rig) -> None:
    with resting.driver.untraced():
        resting.op("Er")
    follower = resting.driver.follower
    assert (follower.rest.active, follower.deviations) == (False, 0)
    for _ in range(4):
        resting.step(*PLAIN)
    assert follower.resident_tensors()


def test_a_plan_that_moves_something_does_not_rest() -> None:
    with rig(3) as r:
        planned(r, *PLAIN)
        for _ in range(MEASURED_STEPS + 2):
            r.step(*PLAIN)
        assert not r.driver.follower.resident_tensors()


def test_quiescing_lets_go_of_tensors_at_rest(resting: Rig) -> None:
    told: list[bool] = []
    resting.driver.follower.rest.let_go = lambda: told.append(True)
    resting.driver.quiesce()
    assert told == [True] and resting.driver.follower.rest.active
