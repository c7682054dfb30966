"""Plans of tensors whose content is discarded by ops that do not touch them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from replays import bytes_a_step

from pagemem.frames.page import TensorId
from scheduler.lookahead.planner import make_plan
from scheduler.planning.bounds import PlanError, check_bounds
from scheduler.planning.machine import TierSpec
from scheduler.planning.trace import Access, AccessMode, Op, OpKind, Trace
from scheduler.simulation.simulator import simulate

PAGE_BYTES = 1 << 16


@st.composite
def steps(draw: st.DrawFn) -> tuple[Trace, dict[TensorId, int], TierSpec]:
    """Uses and discards of a few tensors in any order, and at least the room that the largest one needs."""
    n_bytes = {
        TensorId(number): pages * PAGE_BYTES
        for number, pages in enumerate(draw(st.lists(st.integers(1, 4), min_size=1, max_size=7)))
    }
    modes = st.sampled_from([AccessMode.READ, AccessMode.READ, AccessMode.DISCARD])
    uses = draw(st.lists(st.tuples(st.sampled_from(sorted(n_bytes)), modes), min_size=1, max_size=24))
    ops = [
        Op((OpKind.FORWARD, index), f"op {index}", (Access(tensor, mode),), draw(st.sampled_from([0.01, 1.0])), index)
        for index, (tensor, mode) in enumerate(uses)
    ]
    most_pages = sum(n_bytes.values()) // PAGE_BYTES
    n_frames = draw(st.integers(max(n_bytes.values()) // PAGE_BYTES, most_pages))
    speed = draw(st.sampled_from([0.5, 50.0])) * PAGE_BYTES
    return Trace(tuple(ops)), n_bytes, TierSpec(n_frames, PAGE_BYTES, speed, speed)


@given(steps())
def test_no_op_sees_what_was_there_before_it_was_discarded(work: tuple[Trace, dict[TensorId, int], TierSpec]) -> None:
    trace, n_bytes, machine = work
    plan = make_plan(trace, n_bytes, machine)
    check_bounds(plan, trace, n_bytes, machine)
    read_bytes, written_bytes = bytes_a_step(plan, trace, n_bytes)
    assert written_bytes == 0 and not plan.stores, "nothing has changed"
    assert simulate(plan, trace, n_bytes, machine).read_bytes == pytest.approx(read_bytes)


def test_what_is_not_discarded_stays_and_what_is_comes_again() -> None:
    a, b = TensorId(0), TensorId(1)
    uses = [(a, AccessMode.READ), (b, AccessMode.READ), (a, AccessMode.DISCARD)]
    ops = [Op((OpKind.FORWARD, index), f"op {index}", (Access(*use),), 1.0, index) for index, use in enumerate(uses)]
    trace, n_bytes, machine = Trace(tuple(ops)), dict.fromkeys((a, b), PAGE_BYTES), TierSpec(2, PAGE_BYTES, 1e9, 1e9)
    plan = make_plan(trace, n_bytes, machine)
    assert plan.closed and [load.tensor for load in plan.loads] == [a]
    assert bytes_a_step(plan, trace, n_bytes) == (PAGE_BYTES, 0)


def test_a_copy_made_too_early_is_found_out() -> None:
    a = TensorId(0)
    uses = [AccessMode.READ, AccessMode.DISCARD, AccessMode.READ]
    ops = [
        Op((OpKind.FORWARD, index), f"op {index}", (Access(a, mode),), 1.0, index) for index, mode in enumerate(uses)
    ]
    trace, n_bytes, machine = Trace(tuple(ops)), {a: PAGE_BYTES}, TierSpec(1, PAGE_BYTES, 1e9, 1e9)
    plan = make_plan(trace, n_bytes, machine)
    check_bounds(plan, trace, n_bytes, machine)
    early = tuple(replace(task, trigger=min(task.trigger, 1)) for task in plan.tasks)
    with pytest.raises(PlanError, match="misses|old"):
        check_bounds(replace(plan, tasks=early), trace, n_bytes, machine)
