"""Plans over several tiers, small enough to plan by hand: what is copied for whom, and what follows what."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pagemem.errors import BudgetError
from pagemem.frames.page import TensorId
from pagemem.tier import Tier
from scheduler.lookahead.planner import plan_work
from scheduler.planning.bounds import PlanError, check_work
from scheduler.planning.machine import Machine
from scheduler.planning.plan import Plan
from scheduler.planning.sources import TensorSource
from scheduler.planning.task import Lane, Task, TaskKind
from scheduler.planning.trace import Access, AccessMode, Conditional, Op, OpKind, Trace
from scheduler.planning.work import Work
from scheduler.simulation.simulator import simulate_work

PAGE_BYTES = 1 << 16
PAGE_S = 1e-3
H, D = Tier.HOST, Tier.DEVICE
READ, MODIFY, CREATE, CONSUME = AccessMode.READ, AccessMode.MODIFY, AccessMode.CREATE, AccessMode.CONSUME
#: Two units in host memory and their copies on the device.
A, B, UP_A, UP_B = (TensorId(number) for number in range(4))
UPLOADS = {UP_A: TensorSource(TaskKind.UPLOAD, A, PAGE_BYTES), UP_B: TensorSource(TaskKind.UPLOAD, B, PAGE_BYTES)}


def op(index: int, *accesses: Access, lane: Lane = Lane.COMPUTE, conditional: Conditional | None = None) -> Op:
    return Op((OpKind.FORWARD, index), f"op {index}", accesses, PAGE_S, index, lane, conditional)


def work_of(ops: list[Op], host: int, device: int, sources: dict[TensorId, TensorSource], **speeds: float) -> Work:
    """One page a tensor; every lane moves one in a millisecond, unless ``speeds`` says how many."""
    trace = Trace(tuple(ops))
    per_s = {lane: speeds.get(lane.value, 1.0) * PAGE_BYTES / PAGE_S for lane in Lane}
    tensors = {*trace.tensors(), *(source.tensor for source in sources.values()), *range(20)}
    n_bytes = dict.fromkeys((TensorId(tensor) for tensor in tensors), PAGE_BYTES)
    return Work.of(trace, n_bytes, Machine(PAGE_BYTES, {H: host, D: device}, per_s), None, sources)


def planned(work: Work) -> Plan:
    plan = plan_work(work)
    check_work(plan, work)
    return plan


def of_kind(plan: Plan, kind: TaskKind) -> list[Task]:
    return [task for task in plan.tasks if task.kind is kind]


def test_a_copy_is_made_of_what_was_loaded_for_it() -> None:
    work = work_of([op(0, Access(UP_A, READ, D)), op(1, Access(UP_B, READ, D))], 1, 1, UPLOADS)
    plan = planned(work)
    for upload in of_kind(plan, TaskKind.UPLOAD):
        made_of = [plan.tasks[place] for place in upload.after if plan.tasks[place].kind is TaskKind.LOAD]
        assert [task.tensor for task in made_of] == [UPLOADS[upload.tensor].tensor]
    broken = replace(plan, tasks=tuple(replace(task, after=()) for task in plan.tasks))
    with pytest.raises(PlanError, match="is copied before it is there"):
        check_work(broken, work)
    # Two pages are read and two copied up, one after the other in one frame each: four milliseconds at least.
    assert simulate_work(plan, work).step_s >= 4 * PAGE_S


def test_what_fits_on_the_device_needs_no_host_memory() -> None:
    work = work_of([op(0, Access(UP_A, READ, D)), op(1, Access(UP_B, READ, D))], 1, 2, UPLOADS)
    plan = planned(work)
    assert not plan.tasks and sorted(plan.initial) in ([UP_A, UP_B], [A, UP_A, UP_B], [B, UP_A, UP_B])
    assert simulate_work(plan, work).step_s == pytest.approx(2 * PAGE_S)


def test_an_update_makes_copies_anew() -> None:
    ops = [op(0, Access(UP_A, READ, D)), op(1, Access(UP_B, READ, D)), op(2, Access(A, MODIFY))]
    plan = planned(work_of(ops, 2, 2, UPLOADS))
    assert [task.tensor for task in of_kind(plan, TaskKind.UPLOAD)] == [UP_A] * plan.n_steps
    assert not of_kind(plan, TaskKind.LOAD) and not of_kind(plan, TaskKind.STORE)


def test_an_edited_copy_comes_down_before_what_it_was_made_of_is_used() -> None:
    plan = planned(work_of([op(0, Access(UP_A, MODIFY, D)), op(1, Access(A, READ))], 1, 1, UPLOADS))
    down = of_kind(plan, TaskKind.DOWNLOAD)
    assert down and all((task.tensor, task.tier) == (A, H) for task in down)


def test_updates_beside_compute_do_not_hold_it_up() -> None:
    state = TensorId(8)
    update = op(2, Access(A, MODIFY), Access(state, MODIFY), lane=Lane.UPDATE)
    ops = [
        op(0, Access(A, READ)),
        op(1, Access(B, READ)),
        replace(update, duration_s=2 * PAGE_S),
        op(3, Access(B, READ)),
    ]
    work = work_of([*ops, op(4, Access(B, READ))], 3, 1, {})
    plan = planned(work)
    assert [(task.kind, task.trigger % 5) for task in of_kind(plan, TaskKind.UPDATE)] == [(TaskKind.UPDATE, 2)]
    assert simulate_work(plan, work).step_s == pytest.approx(4 * PAGE_S), "A is used again two ops later"


def test_a_gathered_tensor_is_made_of_its_shard_and_moves_all_ranks_bytes() -> None:
    shard = TensorId(9)
    sources = {A: TensorSource(TaskKind.GATHER, shard, 4 * PAGE_BYTES), UP_A: UPLOADS[UP_A], UP_B: UPLOADS[UP_B]}
    work = work_of(
        [op(0, Access(UP_A, READ, D)), op(1, Access(UP_B, READ, D)), op(2, Access(shard, MODIFY))], 2, 1, sources
    )
    plan = planned(work)
    gathers = of_kind(plan, TaskKind.GATHER)
    assert gathers and all((task.tensor, task.lane, task.n_bytes) == (A, Lane.COMM, 4 * PAGE_BYTES) for task in gathers)
    with pytest.raises(ValueError, match="changes tensor 0, which is gathered; change its shard"):
        work_of([op(0, Access(A, MODIFY))], 2, 1, sources)


def test_there_is_room_for_the_largest_of_what_may_be_used() -> None:
    experts = Conditional((TensorId(10), TensorId(11), TensorId(12)), 2)
    work = work_of(
        [op(0, Access(A, READ), conditional=experts), op(1, Access(B, READ)), op(2, Access(A, READ))], 3, 1, {}
    )
    plan = planned(work)
    (room,) = of_kind(plan, TaskKind.DROP)[: plan.n_steps][:1]
    assert (room.n_bytes, room.fresh) == (2 * PAGE_BYTES, True)
    assert not {task.tensor for task in plan.tasks} & set(experts.tensors)
    taken = replace(plan, tasks=tuple(replace(task, after=()) for task in plan.tasks if task is not room))
    with pytest.raises(PlanError):
        check_work(taken, work)


def test_one_tensor_is_in_one_tier() -> None:
    with pytest.raises(ValueError, match="is used in host and in device memory; each copy needs its own id"):
        work_of([op(0, Access(A, READ, H)), op(1, Access(A, READ, D))], 2, 2, {})
    with pytest.raises(ValueError, match="is made of itself"):
        work_of([op(0, Access(A, READ))], 2, 2, {A: TensorSource(TaskKind.GATHER, A, PAGE_BYTES)})


@pytest.mark.parametrize("source", [TaskKind.UPLOAD, TaskKind.GATHER])
def test_a_copy_that_is_renewed_while_a_view_of_it_lives_is_in_no_plan(source: TaskKind) -> None:
    """Its frames would have to be filled anew, which is done on demand; a plan would have it come too late."""
    tier = D if source is TaskKind.UPLOAD else H
    first = replace_until(op(0, Access(UP_A, READ, tier)), 2)
    ops = [first, op(1, Access(A, MODIFY)), op(2, Access(UP_A, READ, tier))]
    work = work_of(ops, 5, 5, {UP_A: TensorSource(source, A, PAGE_BYTES)})
    with pytest.raises(BudgetError):
        plan_work(work)
    planned(work_of([replace_until(first, 1), *ops[1:]], 5, 5, {UP_A: TensorSource(source, A, PAGE_BYTES)}))


def replace_until(of: Op, until: int) -> Op:
    """The op, with a view that lives until another."""
    return replace(of, until=until)
