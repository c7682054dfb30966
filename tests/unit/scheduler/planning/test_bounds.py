"""Plans written by hand, each wrong in one way, and what is said of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from replays import bytes_a_step, host_plan, without

from pagemem.frames.page import FrameId, TensorId
from pagemem.units import KiB
from scheduler.lookahead.planner import make_plan
from scheduler.planning.bounds import PlanError, check_bounds
from scheduler.planning.machine import TierSpec
from scheduler.planning.plan import Plan
from scheduler.planning.task import Task, load_task, store_task
from scheduler.planning.trace import Access, AccessMode, Op, OpKind, Trace

PAGE_BYTES = 64 * KiB
MODES = {"r": AccessMode.READ, "w": AccessMode.MODIFY, "c": AccessMode.CREATE, "x": AccessMode.CONSUME}
A, B, C = (TensorId(i) for i in range(3))


def trace_of(*ops: str, until: dict[int, int] | None = None) -> Trace:
    """Ops written as ``"Ar Bw"``."""
    made = []
    for index, text in enumerate(ops):
        accesses = tuple(Access(TensorId(ord(word[0]) - ord("A")), MODES[word[1]]) for word in text.split())
        made.append(Op((OpKind.FORWARD, index), text, accesses, 0.01, (until or {}).get(index, index)))
    return Trace(tuple(made))


def load(tensor: TensorId, frame: int, trigger: int, needed_at: int | None = None, *, fresh: bool = False) -> Task:
    needed_at = trigger if needed_at is None else needed_at
    return load_task(tensor, PAGE_BYTES, FrameId(frame), trigger, needed_at, fresh=fresh)


def store(tensor: TensorId, trigger: int) -> Task:
    return store_task(tensor, PAGE_BYTES, trigger)


def plan_of(
    trace: Trace,
    n_frames: int,
    initial: dict[TensorId, int],
    loads: tuple[Task, ...] = (),
    stores: tuple[Task, ...] = (),
    *,
    closed: bool = True,
    peak_frames: int | None = None,
) -> Plan:
    """A plan of one step."""
    tasks = (*stores, *loads)
    return host_plan(trace, n_frames, initial, tasks, closed=closed, peak_frames=peak_frames)


def check(
    plan: Plan, trace: Trace, pages: dict[TensorId, int] | None = None, resident: dict[TensorId, FrameId] | None = None
) -> tuple[int, float, float]:
    """Check a plan of one-page tensors, unless ``pages`` says otherwise; returns the frames it touches, and the bytes
    read and written a step."""
    n_bytes = {
        tensor: (pages or {}).get(tensor, 1) * PAGE_BYTES for tensor in [*trace.tensors(), *(resident or {}), A, B, C]
    }
    check_bounds(plan, trace, n_bytes, TierSpec(plan.n_frames, PAGE_BYTES, 1e9, 1e9), resident)
    return (plan.peak_frames, *bytes_a_step(plan, trace, n_bytes, resident))


# ---- what holds -----------------------------------------------------------------------------------------------------

TURNS = trace_of("Aw", "Bw")
#: One frame for two tensors that change: each is stored and the other one read, every op.
GOOD = plan_of(TURNS, 1, {A: 0}, (load(A, 0, 0), load(B, 0, 1)), (store(B, 0), store(A, 1)))


def test_bytes_a_step() -> None:
    assert check(GOOD, TURNS) == (1, 2 * PAGE_BYTES, 2 * PAGE_BYTES)


def test_peaks_count_the_tensors_that_are_there_at_an_op() -> None:
    trace = trace_of("Ar", "Gc Ar", "Gx Ar", "Ar")
    gradient = TensorId(6)
    plan = plan_of(trace, 3, {A: 0}, (load(gradient, 1, 1, fresh=True),))
    assert check(plan, trace, {gradient: 2}) == (3, 0.0, 0.0)


def test_bytes_are_those_of_a_step_where_a_cycle_has_several() -> None:
    stores = (store(B, 0), store(A, 1), store(B, 2), store(A, 3))
    loads = (load(A, 0, 0), load(B, 0, 1), load(A, 0, 2), load(B, 0, 3))
    assert check(host_plan(TURNS, 1, {A: 0}, (*stores, *loads), n_steps=2), TURNS) == (
        1,
        2 * PAGE_BYTES,
        2 * PAGE_BYTES,
    )


def test_a_plan_that_does_not_close_is_restored_between_cycles() -> None:
    trace = trace_of("Ar", "Bw", "Ar")
    plan = plan_of(trace, 1, {A: 0}, (load(B, 0, 1), load(A, 0, 2)), (store(B, 2),), closed=False)
    assert check(plan, trace)[1] == 2 * PAGE_BYTES
    ends_elsewhere = plan_of(trace_of("Ar", "Bw"), 1, {A: 0}, (load(B, 0, 1),), closed=False)
    # The restoring is part of the cycle.
    assert check(ends_elsewhere, trace_of("Ar", "Bw"))[1:] == (2 * PAGE_BYTES, PAGE_BYTES)
    with pytest.raises(PlanError, match="^op 2: Ar misses 0$"):
        check(
            plan_of(trace_of("Ar", "Bw"), 1, {A: 0}, (load(B, 0, 1),), (store(B, 0),)),
            trace_of("Ar", "Bw"),
        )


def test_fixed_tensors_are_counted_and_stay() -> None:
    trace, resident = trace_of("Br", "Cr"), {A: FrameId(0)}
    plan = plan_of(trace, 2, {A: 0, B: 1}, (load(B, 1, 0), load(C, 1, 1)))
    check(plan, trace, resident=resident)
    with pytest.raises(PlanError, match="^op 0: 0 is resident at frame 0 and not planned there$"):
        check(plan_of(trace, 2, {B: 1}, (load(C, 0, 1),)), trace, resident=resident)
    with pytest.raises(PlanError, match="^op 1: 0 leaves while a view of it lives$"):
        check(plan_of(trace, 2, {A: 0, B: 1}, (load(C, 0, 1),)), trace, resident=resident)


# ---- what does not --------------------------------------------------------------------------------------------------

VIEWED = trace_of("Ar", "Br", "Ar", until={0: 1})
READ = trace_of("Ar", "Br")


@pytest.mark.parametrize(
    ("said", "trace", "plan", "pages"),
    [
        ("op 1: Br misses 1", READ, plan_of(READ, 2, {A: 0}), {}),
        ("op 0: Ar sees an old 0", READ, plan_of(READ, 2, {B: 1}, (load(A, 0, 0, fresh=True),)), {}),
        ("op 0: 1 overlaps 0", READ, plan_of(READ, 2, {A: 0, B: 1}), {A: 2}),
        ("op 0: 1 has no frames 1..2: there are 2", READ, plan_of(READ, 2, {A: 0, B: 1}), {B: 2}),
        ("op 1: 1 has no frames 1..2: there are 2", READ, plan_of(READ, 2, {A: 0}, (load(B, 1, 1),)), {B: 2}),
        (
            "op 1: 0 leaves while a view of it lives",
            VIEWED,
            plan_of(VIEWED, 1, {A: 0}, (load(B, 0, 1), load(A, 0, 2))),
            {},
        ),
        (
            "op 1: 0 leaves dirty: it was not stored after its last change",
            TURNS,
            plan_of(TURNS, 1, {A: 0}, (load(A, 0, 0), load(B, 0, 1)), (store(B, 0),)),
            {},
        ),
        (
            "op 2: 1 leaves dirty: it was not stored after its last change",
            TURNS,
            plan_of(TURNS, 1, {A: 0}, (load(A, 0, 0), load(B, 0, 1)), (store(B, 1), store(A, 1))),
            {},
        ),
        ("op 1: 1 comes too late for op 0", READ, plan_of(READ, 2, {A: 0}, (load(B, 1, 1, 0),)), {}),
        ("op 0: 2 is not for op 1", READ, plan_of(READ, 2, {A: 0, B: 1}, (load(C, 0, 0, 1),)), {}),
        ("op 0: 2 is placed and never used", READ, plan_of(READ, 3, {A: 0, B: 1, C: 2}), {}),
        (
            "op 0: loads start in another order than they stand in",
            READ,
            plan_of(READ, 2, {}, (load(B, 1, 1), load(A, 0, 0))),
            {},
        ),
        (
            "op 0: a task is triggered by no op of the cycle",
            READ,
            plan_of(READ, 2, {A: 0, B: 1}, (), (store(A, 2),)),
            {},
        ),
        ("op 0: the plan expects other ops", READ, replace(plan_of(READ, 2, {A: 0, B: 1}), keys=READ.keys[::-1]), {}),
        ("op 0: the plan has another number of ops", READ, replace(plan_of(READ, 2, {A: 0, B: 1}), n_steps=2), {}),
        (
            "op 0: a task follows one that the plan does not have",
            TURNS,
            replace(GOOD, tasks=tuple(replace(task, after=(4,)) for task in GOOD.tasks)),
            {},
        ),
        (
            "op 1: 0 leaves while a task uses it",
            TURNS,
            replace(GOOD, tasks=tuple(replace(task, after=()) for task in GOOD.tasks)),
            {},
        ),
        ("op 4: 2 frames are touched, the plan says 1", READ, plan_of(READ, 2, {A: 0, B: 1}, peak_frames=1), {}),
    ],
)
def test_the_first_violation_is_named(said: str, trace: Trace, plan: Plan, pages: dict[TensorId, int]) -> None:
    with pytest.raises(PlanError) as caught:
        check(plan, trace, pages)
    assert str(caught.value) == said


def test_a_plan_for_more_frames_than_there_are_is_refused() -> None:
    with pytest.raises(PlanError, match="^op 0: the plan has 2 frames of host, there are 1$"):
        check_bounds(plan_of(READ, 2, {A: 0, B: 1}), READ, {A: 1, B: 1}, TierSpec(1, PAGE_BYTES, 1e9, 1e9))


def test_a_load_taken_out_of_a_planners_plan_is_missed() -> None:
    trace = trace_of("Ar", "Br", "Cw", "Cw", "Br", "Aw")
    n_bytes = dict.fromkeys(trace.tensors(), PAGE_BYTES)
    machine = TierSpec(2, PAGE_BYTES, 1e9, 1e9)
    plan = make_plan(trace, n_bytes, machine)
    check_bounds(plan, trace, n_bytes, machine)
    assert len(plan.loads) > 1 and plan.stores
    for left_out in plan.loads:
        with pytest.raises(PlanError):
            check_bounds(without(plan, left_out.__eq__), trace, n_bytes, machine)
    for left_out in plan.stores:
        with pytest.raises(PlanError, match="leaves dirty"):
            check_bounds(without(plan, left_out.__eq__), trace, n_bytes, machine)
