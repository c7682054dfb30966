"""Rounds of updates of any sizes, in any frames: their plan holds, visits in any order find their content, and on paper
the staleness bound is kept and nobody waits for ever."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import torch
from cross_references import check_mover
from event_log import EventLog
from fake_page_files import ThreadedPageFiles
from hypothesis import given, settings

from pagemem.devices.arena import HostArena
from pagemem.frames.page import FrameId, TensorId
from pagemem.residency.host_mover import HostMover
from pagemem.tier import Tag, Tier
from pagemem.units import KiB
from scheduler.execution.round_follower import RoundFollower
from scheduler.lookahead.planner import plan_work
from scheduler.planning.bounds import check_work
from scheduler.planning.machine import Machine, SharedRate
from scheduler.planning.task import Lane, TaskKind
from scheduler.planning.trace import Access, AccessMode, Op, OpKind, Trace
from scheduler.planning.update_round import RoundUnit, UpdateRound, least_frames
from scheduler.planning.work import Work
from scheduler.simulation.simulator import simulate_work

PAGE_BYTES = 4 * KiB
SHARED = 3
#: Pages of the tensors of each slice, by unit.
Sizes = list[list[list[int]]]
SIZES = st.lists(
    st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=2), min_size=1, max_size=3), min_size=1, max_size=5
)


def round_of(sizes: Sizes, spare: int, update_s: float = 0.0, staleness: int = 0) -> UpdateRound:
    """Units in a chain of two ops each, with frames for three slices and ``spare`` more."""
    ops: list[Op] = []
    units: list[RoundUnit] = []
    n_bytes: dict[TensorId, int] = {}
    for number, unit in enumerate(sizes):
        begin = len(ops)
        for pages in unit:
            tensors = [TensorId(len(n_bytes) + place) for place in range(len(pages))]
            n_bytes.update((tensor, n * PAGE_BYTES) for tensor, n in zip(tensors, pages, strict=True))
            accesses = tuple(Access(tensor, AccessMode.MODIFY) for tensor in tensors)
            ops.append(Op((OpKind.UPDATE, len(ops)), f"slice {len(ops)}", accesses, update_s, len(ops), Lane.UPDATE))
        units.append(
            RoundUnit(f"unit {number}", TensorId(1000 + number), range(begin, len(ops)), number,
                      2 * len(sizes) - 1 - number)
        )  # fmt: skip
    slices = [sum(pages) for unit in sizes for pages in unit]
    n_frames = min(sum(slices), least_frames(slices) + spare)
    return UpdateRound(Trace(tuple(ops)), n_bytes, FrameId(SHARED), n_frames, tuple(units), staleness)


@given(
    sizes=SIZES,
    spare=st.integers(0, 12),
    staleness=st.integers(0, 4),
    pages_per_s=st.sampled_from([1, 20, 1000]),
    update_s=st.sampled_from([0.0, 0.01]),
    shared=st.booleans(),
    together=st.sampled_from([0.5, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_the_plan_holds_and_on_paper_the_bound_is_kept(
    sizes: Sizes, spare: int, staleness: int, pages_per_s: int, update_s: float, shared: bool, together: float
) -> None:
    updates = round_of(sizes, spare, update_s, staleness)
    n_ops, rate = 2 * len(sizes), float(pages_per_s * PAGE_BYTES)
    step = Trace(tuple(Op((OpKind.FORWARD, k), f"op {k}", (), 0.01, k) for k in range(n_ops)))
    limits = (SharedRate(frozenset({Lane.SSD_READ, Lane.SSD_WRITE}), rate),) if shared else ()
    machine = Machine(PAGE_BYTES, {Tier.HOST: SHARED}, {Lane.SSD_READ: rate, Lane.SSD_WRITE: rate}, limits, together)
    work = replace(Work.of(step, {}, machine), updates=updates)
    plan = plan_work(work)
    check_work(plan, work)
    assert plan.updates is not None
    moved = {task.tensor for task in plan.updates.tasks if task.kind is not TaskKind.UPDATE}
    assert bool(moved) is (sum(n // PAGE_BYTES for n in updates.n_bytes.values()) > updates.n_frames)
    found = simulate_work(plan, work)
    assert found.missed <= staleness
    assert found.step_s >= 0.01 * n_ops - 1e-6
    assert (found.read_bytes > 0) is bool(moved)


@given(
    sizes=SIZES,
    spare=st.integers(0, 12),
    visits=st.lists(st.tuples(st.integers(0, 30), st.lists(st.integers(0, 30), max_size=3)), max_size=25),
)
@settings(max_examples=40, deadline=None)
def test_slices_visited_in_any_order_hold_what_was_put_in(
    sizes: Sizes, spare: int, visits: list[tuple[int, list[int]]]
) -> None:
    planned = round_of(sizes, spare)
    files, n_slices = ThreadedPageFiles(), len(planned.trace.ops)
    mover = HostMover(HostArena(SHARED + planned.n_frames, PAGE_BYTES), files, EventLog())  # type: ignore[arg-type]
    for tensor, n_bytes in planned.n_bytes.items():
        assert mover.create(f"tensor {tensor}", Tag.MOMENT, n_bytes).id == tensor
    assert mover.tenants.set_aside(planned.n_frames) == SHARED
    follower = RoundFollower(mover, planned, Machine(PAGE_BYTES, {Tier.HOST: SHARED}, {}))
    holds = dict.fromkeys(planned.n_bytes, 0)
    try:
        for salt, (slice_, following) in enumerate([*visits, *((n, []) for n in range(n_slices))], 1):
            number = slice_ % n_slices
            with follower.held(number, [one % n_slices for one in following]):
                for access in planned.trace.ops[number].accesses:
                    view = mover.tenants.view(mover.tensors[access.tensor], torch.int32, 0, PAGE_BYTES // 4)
                    assert bool((view == holds[access.tensor]).all())
                    view.fill_(salt)
                    holds[access.tensor] = salt
        assert mover.tenants.host.owner(FrameId(0)) is None
    finally:
        mover.monitor.settle()
        files.close()
        check_mover(mover)
        mover.arena.close()
