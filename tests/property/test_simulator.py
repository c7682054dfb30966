"""Simulated plans: some worked out by hand, and what must hold of any of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replays import bytes_a_step, host_plan

from pagemem.errors import BudgetError
from pagemem.frames.page import FrameId, TensorId
from pagemem.units import KiB
from scheduler.lookahead.planner import make_plan
from scheduler.planning.bounds import PlanError
from scheduler.planning.machine import TierSpec
from scheduler.planning.plan import Plan
from scheduler.planning.task import Lane, Task, load_task, store_task
from scheduler.planning.trace import Access, AccessMode, Op, OpKind, Trace
from scheduler.simulation.lane_queues import SimulatedWait
from scheduler.simulation.simulator import Simulation, simulate

PAGE_BYTES = 64 * KiB
#: One page takes a millisecond.
BYTES_PER_S = PAGE_BYTES / 1e-3
MODES = {"r": AccessMode.READ, "w": AccessMode.MODIFY, "c": AccessMode.CREATE, "x": AccessMode.CONSUME}
A, B, C = (TensorId(i) for i in range(3))
SHARES = dict.fromkeys(Lane, 0.0)


def trace_of(*ops: str, ms: float | tuple[float, ...]) -> Trace:
    """Ops written as ``"Ar Bw"``, of so many milliseconds each."""
    made = []
    for index, text in enumerate(ops):
        accesses = tuple(Access(TensorId(ord(word[0]) - ord("A")), MODES[word[1]]) for word in text.split())
        seconds = (ms[index] if isinstance(ms, tuple) else ms) / 1e3
        made.append(Op((OpKind.FORWARD, index), text, accesses, seconds, index))
    return Trace(tuple(made))


def plan_of(
    trace: Trace,
    n_frames: int,
    initial: dict[TensorId, int],
    loads: tuple[Task, ...],
    stores: tuple[Task, ...] = (),
) -> Plan:
    """A plan of one step that closes."""
    return host_plan(trace, n_frames, initial, (*stores, *loads))


def run(plan: Plan, trace: Trace, *, read: float = 1.0, write: float = 1.0) -> Simulation:
    """Simulate one-page tensors; ``read`` and ``write`` are pages a millisecond."""
    machine = TierSpec(plan.n_frames, PAGE_BYTES, read * BYTES_PER_S, write * BYTES_PER_S)
    return simulate(plan, trace, dict.fromkeys(trace.tensors(), PAGE_BYTES), machine)


def load(tensor: TensorId, frame: int, trigger: int, needed_at: int) -> Task:
    return load_task(tensor, PAGE_BYTES, FrameId(frame), trigger, needed_at)


def store(tensor: TensorId, trigger: int) -> Task:
    return store_task(tensor, PAGE_BYTES, trigger)


# ---- by hand --------------------------------------------------------------------------------------------------------


def test_what_fits_takes_the_time_of_its_compute() -> None:
    trace = trace_of("Ar", "Bw", ms=(2.0, 3.0))
    done = run(plan_of(trace, 2, {A: 0, B: 1}, ()), trace)
    assert done.step_s == 0.005 and done.steady and done.waits == ()
    assert done.busy == {**SHARES, Lane.COMPUTE: 1.0}
    assert (done.read_bytes, done.written_bytes) == (0.0, 0.0)


def test_one_frame_for_two_tensors_reads_between_all_ops() -> None:
    # | read A 1 | A 2 | read B 1 | B 3 |: nothing overlaps, because the frame is in use.
    trace = trace_of("Ar", "Br", ms=(2.0, 3.0))
    plan = plan_of(trace, 1, {A: 0}, (load(A, 0, 0, 0), load(B, 0, 1, 1)))
    done = run(plan, trace)
    assert done.step_s == 0.007 and done.steady
    assert done.waits == (
        SimulatedWait(0, "Ar", 0.001, A, Lane.SSD_READ),
        SimulatedWait(1, "Br", 0.001, B, Lane.SSD_READ),
    )
    assert done.busy == {**SHARES, Lane.COMPUTE: 5 / 7, Lane.SSD_READ: 2 / 7}
    assert done.read_bytes == 2 * PAGE_BYTES
    # At a quarter of the bandwidth each read takes 4 ms.
    assert run(plan, trace, read=0.25).step_s == 0.013


def test_two_frames_hide_what_fits_behind_compute() -> None:
    # A stays. B and C take turns in frame 1: C is read while A is used (2 ms), B only while C is not (no time).
    trace = trace_of("Br", "Ar", "Cr", ms=(1.0, 2.0, 3.0))
    plan = plan_of(trace, 2, {A: 0, B: 1}, (load(B, 1, 0, 0), load(C, 1, 1, 2)))
    assert run(plan, trace).waits == (SimulatedWait(0, "Br", 0.001, B, Lane.SSD_READ),)
    assert run(plan, trace).step_s == 0.007
    done = run(plan, trace, read=0.25)  # Each read takes 4 ms: 4 + 1 + max(2, 4) + 3.
    assert done.step_s == 0.012
    assert done.waits == (
        SimulatedWait(0, "Br", 0.004, B, Lane.SSD_READ),
        SimulatedWait(2, "Cr", 0.002, C, Lane.SSD_READ),
    )


def test_a_load_waits_until_its_frames_are_stored_and_the_lane_says_so() -> None:
    # Per op: store the other one (2 ms), read this one (1 ms), use it (1 ms).
    trace = trace_of("Aw", "Bw", ms=1.0)
    plan = plan_of(trace, 1, {A: 0}, (load(A, 0, 0, 0), load(B, 0, 1, 1)), (store(B, 0), store(A, 1)))
    done = run(plan, trace, write=0.5)
    assert done.step_s == 0.008 and done.steady
    assert done.waits == (
        SimulatedWait(0, "Aw", 0.003, A, Lane.SSD_WRITE),
        SimulatedWait(1, "Bw", 0.003, B, Lane.SSD_WRITE),
    )
    assert done.busy == {**SHARES, Lane.COMPUTE: 0.25, Lane.SSD_READ: 0.25, Lane.SSD_WRITE: 0.5}
    assert done.written_bytes == 2 * PAGE_BYTES


def test_a_change_waits_for_the_copy_out_and_a_reading_does_not() -> None:
    changed, read = trace_of("Aw", "Aw", ms=1.0), trace_of("Aw", "Ar", ms=1.0)
    done = run(plan_of(changed, 1, {A: 0}, (), (store(A, 1),)), changed, write=0.25)
    assert done.waits == (SimulatedWait(1, "Aw", 0.004, A, Lane.SSD_WRITE),) and done.step_s == 0.006
    done = run(plan_of(read, 1, {A: 0}, (), (store(A, 1),)), read, write=0.25)
    assert done.waits == (SimulatedWait(0, "Aw", 0.003, A, Lane.SSD_WRITE),) and done.step_s == 0.005


def test_loads_are_served_one_after_the_other() -> None:
    trace = trace_of("Ar Br", "Cr Dr", ms=1.0)
    d = TensorId(3)
    plan = plan_of(trace, 2, {A: 0, B: 1}, (load(A, 0, 0, 0), load(B, 1, 0, 0), load(C, 0, 1, 1), load(d, 1, 1, 1)))
    done = run(plan, trace, read=0.5)
    assert done.step_s == 0.01
    assert done.waits == (
        SimulatedWait(0, "Ar Br", 0.004, B, Lane.SSD_READ),
        SimulatedWait(1, "Cr Dr", 0.004, d, Lane.SSD_READ),
    )


def test_a_load_runs_ahead_over_the_end_of_the_step() -> None:
    # B stays; A and C take turns in frame 0. A is read while B is used, for the next step; C when it is needed.
    trace = trace_of("Ar", "Cr", "Br", ms=(1.0, 2.0, 1.0))
    plan = plan_of(trace, 2, {C: 0, B: 1}, (load(C, 0, 1, 1), load(A, 0, 2, 3)))
    done = run(plan, trace)
    assert done.waits == (SimulatedWait(1, "Cr", 0.001, C, Lane.SSD_READ),) and done.step_s == 0.005
    done = run(plan, trace, read=0.5)
    assert (
        done.waits == (SimulatedWait(0, "Ar", 0.001, A, Lane.SSD_READ), SimulatedWait(1, "Cr", 0.002, C, Lane.SSD_READ))
        and done.step_s == 0.007
    )


def test_frames_of_what_is_consumed_are_free_at_the_end_of_its_op() -> None:
    trace = trace_of("Ac", "Ax Br", "Br Cc", "Cx", ms=1.0)
    loads = (replace(load(A, 0, 0, 0), fresh=True), replace(load(C, 0, 2, 2), fresh=True))
    done = run(plan_of(trace, 2, {B: 1}, loads), trace)
    assert (done.step_s, done.waits, done.read_bytes, done.written_bytes) == (0.004, (), 0.0, 0.0)


def test_a_plan_that_does_not_close_is_restored_in_its_time() -> None:
    # Restoring stores B (1 ms) and reads A (1 ms); B is read once more for op 1.
    trace = trace_of("Ar", "Bw", ms=1.0)
    plan = replace(plan_of(trace, 1, {A: 0}, (load(B, 0, 1, 1),)), closed=False)
    done = run(plan, trace)
    assert done.steady and done.step_s == 0.005
    assert done.waits == (
        SimulatedWait(0, "Ar", 0.002, A, Lane.SSD_WRITE),
        SimulatedWait(1, "Bw", 0.001, B, Lane.SSD_READ),
    )
    assert (done.read_bytes, done.written_bytes) == (2 * PAGE_BYTES, PAGE_BYTES)


def test_a_plan_that_does_not_hold_and_a_lane_without_bandwidth_are_refused() -> None:
    trace = trace_of("Ar", "Br", ms=1.0)
    with pytest.raises(PlanError, match="op 1: Br misses 1"):
        run(plan_of(trace, 1, {A: 0}, ()), trace)
    good = plan_of(trace, 2, {A: 0, B: 1}, ())
    for wrong in ({"read": 0.0}, {"write": -1.0}):
        with pytest.raises(ValueError, match="^bandwidths must be above 0"):
            run(good, trace, **wrong)


# ---- any plan -------------------------------------------------------------------------------------------------------


@st.composite
def planned(draw: st.DrawFn) -> tuple[Plan, Trace, dict[TensorId, int]]:
    """A planner's plan for a random step: lasting tensors, and some that are made and consumed within it."""
    tensors = [TensorId(i) for i in range(draw(st.integers(1, 6)))]
    used = [
        draw(st.lists(st.sampled_from(tensors), min_size=1, max_size=3, unique=True))
        for _ in range(draw(st.integers(1, 8)))
    ]
    passing = {t for t in tensors if draw(st.booleans()) and sum(t in own for own in used) > 1}
    ops: list[Op] = []
    for index, own in enumerate(used):
        accesses = []
        for tensor in own:
            mode = draw(st.sampled_from([AccessMode.READ, AccessMode.MODIFY]))
            if tensor in passing and not any(tensor in other for other in used[:index]):
                mode = AccessMode.CREATE
            elif tensor in passing and not any(tensor in other for other in used[index + 1 :]):
                mode = AccessMode.CONSUME
            accesses.append(Access(tensor, mode))
        until = draw(st.integers(index, len(used) - 1)) if not set(own) & passing and draw(st.booleans()) else index
        ops.append(
            Op(
                (OpKind.FORWARD, index),
                f"op {index}",
                tuple(accesses),
                draw(st.sampled_from([0.0, 0.0013, 0.004])),
                until,
            )
        )
    trace = Trace(tuple(ops))
    n_bytes = {t: draw(st.integers(1, 3)) * PAGE_BYTES for t in tensors}
    alive = [{a.tensor for op in ops[: i + 1] if op.until >= i for a in op.accesses} for i in range(len(ops))]
    n_frames = max(sum(n_bytes[t] for t in at_once) for at_once in alive) // PAGE_BYTES + draw(st.integers(0, 6))
    try:
        return make_plan(trace, n_bytes, TierSpec(n_frames, PAGE_BYTES, BYTES_PER_S, BYTES_PER_S)), trace, n_bytes
    except BudgetError:
        return draw(planned())  # What is held lay so that no window was left.


speeds = st.sampled_from([0.3, 1.0, 2.5, 40.0])


def machine_of(plan: Plan, read: float, write: float) -> TierSpec:
    return TierSpec(plan.n_frames, PAGE_BYTES, read * BYTES_PER_S, write * BYTES_PER_S)


@settings(max_examples=200, deadline=None)
@given(planned(), speeds, speeds)
def test_a_step_takes_at_least_what_each_lane_has_to_do(
    work: tuple[Plan, Trace, dict[TensorId, int]], read: float, write: float
) -> None:
    plan, trace, n_bytes = work
    machine = machine_of(plan, read, write)
    done = simulate(plan, trace, n_bytes, machine)
    rounding = 1 + 1e-9
    assert done.step_s * rounding >= trace.compute_s
    assert done.step_s * rounding >= done.read_bytes / machine.read_bytes_per_s
    assert done.step_s * rounding >= done.written_bytes / machine.write_bytes_per_s
    assert all(0 <= share <= 1 for share in done.busy.values())
    if done.steady:
        assert not done.waits or min(wait.seconds for wait in done.waits) > 0
        assert (done.read_bytes, done.written_bytes) == bytes_a_step(plan, trace, n_bytes)
    assert simulate(plan, trace, n_bytes, machine) == done


@settings(max_examples=200, deadline=None)
@given(planned(), speeds, speeds, speeds, speeds)
def test_a_faster_disk_never_makes_the_same_plan_slower(
    work: tuple[Plan, Trace, dict[TensorId, int]], read: float, write: float, more_read: float, more_write: float
) -> None:
    plan, trace, n_bytes = work
    slow = simulate(plan, trace, n_bytes, machine_of(plan, read, write))
    fast = simulate(plan, trace, n_bytes, machine_of(plan, max(read, more_read), max(write, more_write)))
    if slow.steady and fast.steady:
        assert fast.step_s <= slow.step_s * (1 + 1e-9)


@settings(max_examples=100, deadline=None)
@given(planned(), speeds)
def test_with_a_frame_for_every_page_nothing_waits(work: tuple[Plan, Trace, dict[TensorId, int]], read: float) -> None:
    _, trace, n_bytes = work
    one_page = dict.fromkeys(n_bytes, PAGE_BYTES)
    plan = make_plan(trace, one_page, TierSpec(len(n_bytes), PAGE_BYTES, BYTES_PER_S, BYTES_PER_S))
    done = simulate(plan, trace, one_page, machine_of(plan, read, read))
    assert done.waits == () and done.steady and (done.read_bytes, done.written_bytes) == (0.0, 0.0)
    assert done.step_s == pytest.approx(trace.compute_s)
