"""Lock-free steps on paper: cases whose times follow by hand."""

from __future__ import annotations

import pytest

from offload.forecast.late_updates import LateSpec, LateTask, LateTaskKind, LateUnit, simulate_late

MB = 10**6


def batch(n_slices: int, n_bytes: int, update_s: float) -> list[LateTask]:
    """What a unit's batch takes: each slice is read, updated and written; without bytes it stays in memory."""
    tasks: list[LateTask] = []
    for _ in range(n_slices):
        if n_bytes:
            tasks.append(LateTask(LateTaskKind.LOAD, "ssd_read", n_bytes, 0.0))
        tasks.append(LateTask(LateTaskKind.UPDATE, "update", 0, update_s, (len(tasks) - 1,) if n_bytes else ()))
        if n_bytes:
            tasks.append(LateTask(LateTaskKind.STORE, "ssd_write", n_bytes, 0.0, (len(tasks) - 1,)))
    return tasks


def spec(
    units: list[list[LateTask]], compute_s: float, *, staleness: int = 4, mb_per_s: float = 1e9, together: float = 1.0,
    shared: bool = True,
) -> LateSpec:  # fmt: skip
    """Each unit has an op in the forward pass and one in the backward pass, in the order of a chain of layers."""
    n = len(units)
    late = [LateUnit(place, 2 * n - 1 - place, tasks) for place, tasks in enumerate(units)]
    each_s = compute_s / (2 * n)
    return LateSpec([each_s] * (2 * n), late, mb_per_s * MB, mb_per_s * MB, shared, staleness, together)


def test_updates_that_have_cores_of_their_own_and_keep_pace_cost_nothing() -> None:
    found = simulate_late(spec([batch(2, 0, 0.01)] * 4, 1.0))
    assert found.step_s == pytest.approx(1.0) and found.wait_s == 0.0
    assert found.busy["update"] == pytest.approx(0.08) and found.read_bytes == 0.0


def test_on_shared_cores_all_work_is_done_in_turns() -> None:
    found = simulate_late(spec([batch(2, 0, 0.02)] * 4, 1.0, together=0.5))
    assert found.step_s == pytest.approx(1.0 + 8 * 0.02, rel=0.01)


def test_a_disk_that_is_too_slow_merges_steps_and_holds_nobody_up() -> None:
    # 4 units of 2 slices, 10 MB each way: 160 MB a round, at 80 MB/s 2 s, while a step computes 1 s.
    found = simulate_late(spec([batch(2, 10 * MB, 0.001)] * 4, 1.0, mb_per_s=80, staleness=4))
    assert found.step_s == pytest.approx(1.0) and found.wait_s == 0.0
    assert found.read_bytes == pytest.approx(40 * MB, rel=0.1) and found.busy["ssd_read"] == pytest.approx(0.5, rel=0.1)
    assert 1.0 < found.missed < 3.0


def test_without_staleness_a_step_waits_for_the_disk() -> None:
    found = simulate_late(spec([batch(2, 10 * MB, 0.001)] * 4, 1.0, mb_per_s=80, staleness=0))
    assert 2.0 < found.step_s < 3.0 and found.wait_s == pytest.approx(found.step_s - 1.0)
    assert found.read_bytes == pytest.approx(80 * MB) and found.missed == 0.0


@pytest.mark.parametrize("staleness", [1, 2, 8])
def test_the_bound_holds_and_more_staleness_is_never_slower(staleness: int) -> None:
    less, more = (
        simulate_late(spec([batch(2, 10 * MB, 0.001)] * 4, 1.0, mb_per_s=40, staleness=bound))
        for bound in (staleness - 1, staleness)
    )
    assert more.step_s <= less.step_s + 1e-9 and more.missed <= staleness


def test_two_lanes_read_and_write_at_once() -> None:
    one, two = (
        simulate_late(spec([batch(4, 10 * MB, 0.001)] * 2, 0.1, mb_per_s=80, staleness=0, shared=shared))
        for shared in (True, False)
    )
    assert two.step_s < 0.7 * one.step_s


def test_nothing_late_takes_what_it_computes() -> None:
    found = simulate_late(LateSpec([0.25] * 4, [], 1.0, 1.0, True, 4))
    assert (found.step_s, found.wait_s, found.missed, found.read_bytes) == (1.0, 0.0, 0.0, 0.0)
