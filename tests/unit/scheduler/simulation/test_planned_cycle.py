"""When tasks of a plan begin and end, by hand."""

from __future__ import annotations

from dataclasses import replace

from replays import PAGE_BYTES, host_plan

from pagemem.frames.page import FrameId, TensorId
from scheduler.planning.machine import TierSpec
from scheduler.planning.plan import Plan
from scheduler.planning.task import Lane, Task, load_task, store_task
from scheduler.planning.trace import Access, AccessMode, Op, OpKind, Trace
from scheduler.planning.work import Work
from scheduler.simulation.lane_queues import SimulatedWait
from scheduler.simulation.simulator import PlannedCycle, TimedOp, TimedTask, planned_cycle

A, B = TensorId(0), TensorId(1)


def load(tensor: TensorId, frame: int, trigger: int, needed_at: int) -> Task:
    return load_task(tensor, PAGE_BYTES, FrameId(frame), trigger, needed_at)


def op(index: int, tensor: TensorId, mode: AccessMode) -> Op:
    return Op((OpKind.FORWARD, index), f"op {index}", (Access(tensor, mode),), 0.001, index)


def cycle_of(plan: Plan, trace: Trace) -> PlannedCycle:
    """A page is read in 1 ms and written in 2."""
    machine = TierSpec(plan.n_frames, PAGE_BYTES, PAGE_BYTES / 1e-3, PAGE_BYTES / 2e-3)
    return planned_cycle(plan, Work.of(trace, dict.fromkeys(trace.tensors(), PAGE_BYTES), machine))


def test_each_op_stores_the_other_tensor_and_reads_its_own() -> None:
    # The example of docs/planning.md: | store B 2 | read A 1 | op 0 1 | store A 2 | read B 1 | op 1 1 |
    trace = Trace((op(0, A, AccessMode.MODIFY), op(1, B, AccessMode.MODIFY)))
    tasks = (store_task(B, PAGE_BYTES, 0), store_task(A, PAGE_BYTES, 1), load(A, 0, 0, 0), load(B, 0, 1, 1))
    plan = host_plan(trace, 1, {A: 0}, tasks)
    found = cycle_of(plan, trace)
    assert (found.n_steps, found.end_s) == (1, 0.008)
    assert found.ops == (
        TimedOp(0, 0.003, 0.004, SimulatedWait(0, "op 0", 0.003, A, Lane.SSD_WRITE)),
        TimedOp(1, 0.007, 0.008, SimulatedWait(1, "op 1", 0.003, B, Lane.SSD_WRITE)),
    )
    store_b, read_a, store_a, read_b = found.tasks
    assert [task.task.tensor for task in found.tasks] == [B, A, A, B]
    assert store_b == TimedTask(store_b.task, 0.0, 0.0, 0.002, True, False, None)
    assert read_a == TimedTask(read_a.task, 0.0, 0.002, 0.003, True, False, Lane.SSD_WRITE)
    assert (store_a.begin_s, read_b.begin_s, read_b.end_s) == (0.004, 0.006, 0.007)


def test_a_task_that_runs_over_the_end_of_its_cycle_is_followed_to_its_own() -> None:
    # A and B take turns in a frame; A is read ahead for the next cycle, once op 1 has done with B.
    trace = Trace((op(0, A, AccessMode.READ), op(1, B, AccessMode.READ), op(2, TensorId(2), AccessMode.READ)))
    plan = host_plan(trace, 2, {B: 0, TensorId(2): 1}, (load(B, 0, 1, 1), load(A, 0, 2, 3)))
    found = cycle_of(plan, trace)
    read_b, read_a = found.tasks
    # | read B 1 | op 1 1 | op 2 1 | op 0 1 |: A is read while op 2 runs, and op 0 does not wait.
    assert found.end_s == 0.004 and (read_a.asked_s, read_a.begin_s, read_a.end_s) == (0.003, 0.003, 0.004)
    assert (read_b.asked_s, read_b.end_s) == (0.001, 0.002)


def test_what_restores_a_placement_belongs_to_no_op() -> None:
    trace = Trace((op(0, A, AccessMode.READ), op(1, B, AccessMode.MODIFY)))
    plan = replace(host_plan(trace, 1, {A: 0}, (load(B, 0, 1, 1),)), closed=False)
    found = cycle_of(plan, trace)
    assert [(task.task.tensor, task.restores) for task in found.tasks] == [(B, True), (A, True), (B, False)]
    assert [(task.begin_s, task.end_s) for task in found.tasks] == [(0.0, 0.002), (0.002, 0.003), (0.004, 0.005)]
