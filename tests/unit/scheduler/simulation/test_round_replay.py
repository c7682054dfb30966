"""Lock-free steps on paper: cases whose times follow by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pagemem.frames.page import FrameId, TensorId
from pagemem.tier import Tier
from scheduler.lookahead.planner import plan_work
from scheduler.planning.bounds import check_work
from scheduler.planning.machine import Machine, SharedRate
from scheduler.planning.task import Lane, TaskKind
from scheduler.planning.trace import Access, AccessMode, Op, OpKind, Trace
from scheduler.planning.update_round import RoundUnit, UpdateRound, furthest_behind
from scheduler.planning.work import Work
from scheduler.simulation.simulator import Simulation, planned_cycle, simulate_work

MB = 10**6
#: Frames of the step, which uses none.
STEP_FRAMES = 4


def work_of(
    n_units: int, n_slices: int, n_bytes: int, update_s: float, compute_s: float, *, frames: int | None = None,
    staleness: int = 4, mb_per_s: float = 1e9, together: float = 1.0, shared: bool = True,
) -> Work:  # fmt: skip
    """Each unit has an op in the forward pass and one in the backward pass, in the order of a chain of layers.

    Args:
        n_bytes: of a slice, a frame of the machine; 0: it has no states.
        frames: of the round; None: for all slices.
    """
    each_s = compute_s / (2 * n_units) if n_units else compute_s / 4
    ops = tuple(Op((OpKind.FORWARD, k), f"op {k}", (), each_s, k) for k in range(2 * n_units or 4))
    slices = n_units * n_slices
    accesses = [(Access(TensorId(k), AccessMode.MODIFY),) if n_bytes else () for k in range(slices)]
    updates = Trace(
        tuple(Op((OpKind.UPDATE, k), f"slice {k}", accesses[k], update_s, k, Lane.UPDATE) for k in range(slices))
    )
    units = tuple(
        RoundUnit(f"unit {u}", TensorId(1000 + u), range(u * n_slices, (u + 1) * n_slices), u, 2 * n_units - 1 - u)
        for u in range(n_units)
    )
    sizes = {TensorId(k): n_bytes for k in range(slices)} if n_bytes else {}
    n_frames = slices if frames is None else frames
    found = UpdateRound(updates, sizes, FrameId(STEP_FRAMES), n_frames, units, staleness)
    rate = mb_per_s * MB
    limits = (SharedRate(frozenset({Lane.SSD_READ, Lane.SSD_WRITE}), rate),) if shared else ()
    machine = Machine(
        n_bytes or 1, {Tier.HOST: STEP_FRAMES}, {Lane.SSD_READ: rate, Lane.SSD_WRITE: rate}, limits, together
    )
    return replace(Work.of(Trace(ops), {}, machine), updates=found)


def simulated(work: Work) -> Simulation:
    """By its plan, which holds."""
    plan = plan_work(work)
    check_work(plan, work)
    return simulate_work(plan, work)


def waited_s(found: Simulation) -> float:
    """For updates."""
    return sum(wait.seconds for wait in found.waits if wait.lane is Lane.UPDATE)


def test_updates_that_have_cores_of_their_own_and_keep_pace_cost_nothing() -> None:
    found = simulated(work_of(4, 2, MB, 0.01, 1.0))
    assert found.step_s == pytest.approx(1.0) and not found.waits and found.steady
    assert found.busy[Lane.UPDATE] == pytest.approx(0.08) and found.read_bytes == 0.0


def test_on_shared_cores_all_work_is_done_in_turns() -> None:
    found = simulated(work_of(4, 2, MB, 0.02, 1.0, together=0.5))
    assert found.step_s == pytest.approx(1.0 + 8 * 0.02, rel=0.01)


def test_a_disk_that_is_too_slow_merges_steps_and_holds_nobody_up() -> None:
    # 4 units of 2 slices, 10 MB each way: 160 MB a round, at 80 MB/s 2 s, while a step computes 1 s.
    found = simulated(work_of(4, 2, 10 * MB, 0.001, 1.0, frames=3, mb_per_s=80, staleness=4))
    assert found.step_s == pytest.approx(1.0) and waited_s(found) == 0.0
    assert found.read_bytes == pytest.approx(40 * MB, rel=0.1)
    assert found.busy[Lane.SSD_READ] > 0.9 and found.busy[Lane.SSD_WRITE] > 0.9, "a shared rate has both at work"
    assert 1.0 < found.missed < 3.0


def test_without_staleness_a_step_waits_for_the_disk() -> None:
    found = simulated(work_of(4, 2, 10 * MB, 0.001, 1.0, frames=3, mb_per_s=80, staleness=0))
    assert 2.0 < found.step_s < 3.0 and waited_s(found) == pytest.approx(found.step_s - 1.0, rel=0.01)
    # A slice or two are there still when the step wants them, out of turn.
    assert 60 * MB <= found.read_bytes <= 80 * MB and found.missed == 0.0


@pytest.mark.parametrize("staleness", [1, 2, 8])
def test_the_bound_holds_and_more_staleness_is_hardly_ever_slower(staleness: int) -> None:
    less, more = (
        simulated(work_of(4, 2, 10 * MB, 0.001, 1.0, frames=3, mb_per_s=40, staleness=bound))
        for bound in (staleness - 1, staleness)
    )
    assert more.step_s <= less.step_s * 1.02 and more.missed <= staleness


def test_two_lanes_read_and_write_at_once() -> None:
    one, two = (
        simulated(work_of(2, 4, 10 * MB, 0.001, 0.1, frames=3, mb_per_s=80, staleness=0, shared=shared))
        for shared in (True, False)
    )
    assert two.step_s < 0.7 * one.step_s


@pytest.mark.parametrize("n_units", [0, 3])
def test_updates_without_states_take_what_they_compute(n_units: int) -> None:
    found = simulated(work_of(n_units, 1, 0, 0.01, 1.0))
    # The gradient of the first unit comes last, and it is the first to be used.
    missed = pytest.approx(1 / n_units if n_units else 0.0)
    assert (found.step_s, found.missed, found.read_bytes) == (pytest.approx(1.0), missed, 0.0)
    assert found.busy[Lane.UPDATE] == pytest.approx(0.01 * n_units)


def test_what_fits_stays_and_the_rest_passes_through_three_windows() -> None:
    work = work_of(8, 1, 10 * MB, 0.001, 1.0, frames=5, mb_per_s=1000, staleness=0)
    plan = plan_work(work)
    assert plan.updates is not None
    check_work(plan, work)
    assert len({task.tensor for task in plan.updates.stores}) == 8 - (5 - 3)
    assert simulate_work(plan, work).read_bytes == pytest.approx(6 * 10 * MB)
    assert all(task.frame >= STEP_FRAMES for task in plan.updates.loads)


def test_the_cycle_of_a_step_has_the_tasks_of_both_threads() -> None:
    work = work_of(4, 2, 10 * MB, 0.001, 1.0, frames=3, mb_per_s=1000, staleness=1)
    cycle = planned_cycle(plan_work(work), work)
    kinds = [task.task.kind for task in cycle.tasks]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == dict.fromkeys(
        (TaskKind.LOAD, TaskKind.UPDATE, TaskKind.STORE), 8
    )
    assert all(task.end_s >= task.begin_s >= task.asked_s and not task.restores for task in cycle.tasks)


def test_the_unit_furthest_behind_is_next_and_then_the_one_after_in_the_round() -> None:
    assert furthest_behind([], 2, 5) is None
    assert furthest_behind([(0, 1), (3, 2), (4, 1)], 2, 5) == 3
    assert furthest_behind([(0, 1), (3, 1), (4, 1)], 2, 5) == 3
    assert furthest_behind([(0, 1), (2, 1)], 2, 5) == 0
