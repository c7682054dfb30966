"""Ops outside of the plan: between steps and amid one, and host memory given up."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
from driver_steps import PLAIN, STEP, planned
from training_rig import rig

from pagemem.residency.paged_tensor import Residency
from scheduler.execution import step_planner as planning_module
from scheduler.execution.plan_follower import Mode
from scheduler.lookahead.cycle import MAX_STEPS
from scheduler.lookahead.planner import plan_work
from scheduler.planning.durations import MEASURED_STEPS, Durations
from scheduler.planning.plan import Plan
from scheduler.planning.trace import Op, OpKind, Trace, TraceRecorder
from scheduler.planning.work import Work

# ---- interludes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_frames", [2, 3, 5])
def test_ops_between_steps_leave_the_plan_as_it_is(n_frames: int) -> None:
    with rig(n_frames) as r:
        planned(r, *STEP)
        for _ in range(MEASURED_STEPS + 1):
            r.step(*STEP)
        plan = r.driver.follower.plan
        for turn in range(4):
            with r.driver.untraced():
                for text in ("Dr", "Ar Br", "Cr", "Dw")[: turn + 1]:
                    r.op(text)
            r.step(*STEP)
        assert r.driver.follower.plan is plan
        assert (r.driver.follower.deviations, r.driver.follower.planned_steps) == (0, 5 + MEASURED_STEPS + 1)
        r.read_all()


@pytest.mark.parametrize("n_frames", [2, 3, 5])
def test_the_plan_is_made_once_more_with_the_times_of_planned_steps(
    n_frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[float] = []

    def spied(work: Work, **named: Any) -> Plan:
        made.append(work.trace.compute_s)
        return plan_work(work, **named)

    monkeypatch.setattr(planning_module, "plan_work", spied)
    with rig(n_frames) as r:
        step_s = iter([9.0, 8.0, 1.0, 3.0, 2.0])
        finish = TraceRecorder.finish
        monkeypatch.setattr(
            TraceRecorder, "finish", lambda recorder, **timed: lasting(finish(recorder, **timed), next(step_s, 7.0))
        )
        for steps in range(1, 4 + MEASURED_STEPS):
            r.step(*STEP)
            assert (len(made), r.driver.follower.planned_steps) == (1 if steps < 2 + MEASURED_STEPS else 2, steps - 1)
        assert made == pytest.approx([9.0, 2.0]), "the first planned step is left out; of the others the median counts"
        for _ in range(2 * MAX_STEPS):
            r.step(*STEP)
        assert len(made) == 2 and r.driver.follower.deviations == 0
        r.read_all()


def test_a_step_with_ops_missing_says_nothing_about_durations() -> None:
    ops = tuple(Op((OpKind.UPDATE, index), f"op {index}", (), 1.0, index) for index in range(3))
    found = Durations()
    assert found.add(Trace(ops), Trace(ops)) is None
    for _ in range(MEASURED_STEPS - 1):
        assert found.add(Trace(ops), lasting(Trace(ops), 6.0)) is None
        assert found.add(Trace(ops), lasting(Trace(ops[:2]), 9.0)) is None
    refined = found.add(Trace(ops), lasting(Trace(ops), 6.0))
    assert refined is not None and [op.duration_s for op in refined.ops] == [2.0, 2.0, 2.0]
    assert found.add(Trace(ops), lasting(Trace(ops), 6.0)) is None, "once is enough"


def lasting(trace: Trace, step_s: float) -> Trace:
    """The trace with ops of equal durations."""
    return Trace(tuple(replace(op, duration_s=step_s / len(trace.ops)) for op in trace.ops))


@pytest.mark.parametrize("n_frames", [2, 3, 5])
@pytest.mark.parametrize("place", range(1, len(PLAIN)))
def test_ops_amid_a_step_are_right_and_the_next_step_is_planned_again(n_frames: int, place: int) -> None:
    with rig(n_frames) as r:
        planned(r, *PLAIN)
        plan = r.driver.follower.plan
        for text in PLAIN[:place]:
            r.op(text)
        with r.driver.untraced():
            for text in ("Ew", "Cr Dr"):
                r.op(text)
        r.step(*PLAIN[place:])
        # Not a deviation: the step did not change.
        assert (r.driver.follower.mode, r.driver.follower.deviations) == (
            Mode.PLANNED,
            0,
        )  # not a deviation: the step did not change
        assert r.driver.follower.plan is plan
        for _ in range(3):
            r.step(*PLAIN)
        assert (r.driver.follower.deviations, r.driver.on_demand_steps) == (0, 1)
        r.read_all()


def test_an_interlude_inside_another_ends_with_the_outer_one() -> None:
    with rig(2) as r:
        planned(r, *PLAIN)
        with r.driver.untraced():
            with r.driver.untraced():
                r.op("Er")
            r.op("Dr")
        r.step(*PLAIN)
        assert (r.driver.follower.deviations, r.driver.follower.planned_steps) == (0, 2)


def test_an_interlude_that_raises_still_ends() -> None:
    with rig(2) as r:
        planned(r, *PLAIN)
        with pytest.raises(KeyError), r.driver.untraced():
            r.op("Er")
            raise KeyError
        r.step(*PLAIN)
        assert (r.driver.follower.deviations, r.driver.follower.planned_steps) == (0, 2)


@pytest.mark.parametrize("n_frames", [2, 3, 5])
def test_updates_that_an_interlude_made_may_be_missing_from_the_step(n_frames: int) -> None:
    ops = ("u: Aw", "Ar", "u: Bw", "Br", "Cr Dr", "u: Cw", "u: Dw")
    with rig(n_frames) as r:
        planned(r, *ops)
        with r.driver.untraced():
            for text in ("u: Aw", "u: Bw"):
                r.op(text)
        r.step("Ar", "Br", "Cr Dr", "u: Cw", "u: Dw")
        r.step("u: Aw", "Ar", "u: Bw", "Br", "Cr Dr")
        with r.driver.untraced():
            for text in ("u: Cw", "u: Dw"):
                r.op(text)
        r.step(*ops)
        assert (r.driver.follower.deviations, r.driver.follower.planned_steps) == (0, 4)
        r.read_all()


# ---- emptying host memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_frames", [2, 5])
@pytest.mark.parametrize("place", [0, 3, len(PLAIN)])
def test_all_host_memory_can_be_given_up_anywhere_between_ops(n_frames: int, place: int) -> None:
    with rig(n_frames) as r:
        planned(r, *PLAIN)
        for text in PLAIN[:place]:
            r.op(text)
        r.driver.evict_all()
        assert r.mover.host.used_frames == 0
        assert all(tensor.state in (Residency.STORED, Residency.ABSENT) for tensor in r.tensors.values())
        r.step(*PLAIN[place:])
        r.step(*PLAIN)
        assert (r.driver.follower.mode, r.driver.follower.deviations) == (Mode.PLANNED, 0)
        r.read_all()


def test_host_memory_is_not_given_up_while_a_view_lives() -> None:
    with rig(2) as r:
        r.op("Aw")
        view = r.lease("A")
        with pytest.raises(AssertionError, match="A is held"):
            r.driver.evict_all()
        r.check(r.tensors["A"])
        del view
        gc.collect()
        r.driver.evict_all()
        assert r.mover.host.used_frames == 0
        r.op("Ar")
